"""Token files: the format, the writers, the reader, and nanoGPT's ``meta.pkl``."""

from striped_hf.data.tokens.format import DataSetError
from striped_hf.data.tokens.split import TokenSplit, open_split
from striped_hf.data.tokens.writer import DataSetWriter, write_data_set

__all__ = ["DataSetError", "DataSetWriter", "TokenSplit", "open_split", "write_data_set"]
