"""The mean loss per token as a metric of the ``evaluate`` library."""

from collections.abc import Sequence

from datasets import Features, Value
from evaluate import Metric, MetricInfo

from striped_hf.evaluation import mean_token_loss


class TokenLoss(Metric):
    """:func:`striped_hf.evaluation.mean_token_loss` for programs that combine metrics.

    Each sequence has ``losses``, the sum of its token losses in nats (float), and ``tokens``, the
    number of its tokens (int).
    """

    def _info(self) -> MetricInfo:
        return MetricInfo(
            description="Mean loss of tokens, with its standard error and perplexity.",
            citation="",
            inputs_description="losses: summed over each sequence; tokens: counted in each.",
            features=Features({"losses": Value("float64"), "tokens": Value("int64")}),
        )

    def _compute(self, losses: Sequence[float], tokens: Sequence[int]) -> dict[str, float | None]:
        return mean_token_loss(losses, tokens)
