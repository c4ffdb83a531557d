"""The names of all choices. Without PyTorch, which what they stand for needs, so that programs print help at once.

What a name stands for is in the dict that is called the same; a test compares the names.
"""

DTYPES = ("auto", "float32", "bfloat16", "float16")
SAMPLINGS = ("random", "first")
PROTOCOLS = ("default", "svd-llm")
BUDGETS = ("parameters", "bytes")
RANK_METRICS = ("stable", "effective", "mathematical")
MODULATIONS = ("logarithmic", "power", "exponential", "linear")
CLUSTERINGS = ("type", "type_depth")
ALLOCATIONS = ("hisvd", "loss", "uniform")
WHITENINGS = ("two_sided", "input", "none")
MOVES = ("both", "low_rank", "neurons")
FORMS = ("pivoted", "svd")
UPDATES = ("sequential", "none")
REFINEMENTS = ("none", "norms", "weights")
LINEAR_DTYPES = ("bf16", "int8", "int4")
EXPORTS = ("none", "int6", "dense", "plain")
INT6_MODES = ("calibrated", "magnitude")
