"""AdamW at a fraction of its optimizer memory, for ``transformers.Trainer``."""
