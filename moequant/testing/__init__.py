"""Tools for tests and benchmarks: random routing, a recorder of a model's routing, the result of several ranks computed by one process,
comparisons, poison, and a launcher of worker processes."""

from moequant.testing.comparison import assert_bit_equal, assert_nearly_quantized, cosine_difference, poison, relative_error
from moequant.testing.generators import routing
from moequant.testing.one_process import in_one_process
from moequant.testing.ranks import RankFailedError, run_ranks
from moequant.testing.recording import record_routing

__all__ = [
    "RankFailedError",
    "assert_bit_equal",
    "assert_nearly_quantized",
    "cosine_difference",
    "in_one_process",
    "poison",
    "record_routing",
    "relative_error",
    "routing",
    "run_ranks",
]
