"""Plan the ranks from the cache, then factor the model layer by layer into shards."""

from collections.abc import Hashable, Iterator, Sequence

import torch
from tqdm import tqdm

from hisvd.calibration_cache import LEADING_VECTORS, SPECTRA, CalibrationCache, input_moment, output_moment
from hisvd.clustering import layer_clusters
from hisvd.component.experts import kind_of
from hisvd.errors import naming
from hisvd.factor_forms import factor_tensors
from hisvd.int6_fit import int6_entries
from hisvd.rank_allocation import loss_ranks, project_shares, ranks_from_shares, stage1_shares, uniform_shares
from hisvd.rank_metrics import rank_of
from hisvd.refinement import stage2_factors
from hisvd.sequential_update import SequentialUpdate
from hisvd.shape_utils import Sublayer, is_dense
from hisvd.utils import distributed
from hisvd.utils.model_utils import Checkpoint
from hisvd.utils.save_utils import ModelWriter
from hisvd.whitening_svd import H_DAMPING, cholesky_root, left_singular_vectors, low_rank_factors, whitened


def plan_ranks(
    cache: CalibrationCache,
    targets: Sequence[float],
    *,
    form: str,
    allocation: str,
    rank_method: str,
    alpha: float,
    modulation: str,
    lwe_strength: float,
    tail_redundancy_weight: float,
    cluster_by: str,
) -> dict[float, list[int]]:
    """Ranks of all sublayers (in the order of `cache.sublayers`) for every target, from the cache alone.

    `allocation` is `uniform`, `hisvd` (Stage 1 refined by Stage 2; lwe_strength 0 leaves Stage 1 alone), or `loss`
    (least second-order estimate of the loss added, from the two-sided singular values, without gradients the
    input-whitened ones).

    Raises:
        HiSVDError: a damaged cache, or a target below rank 1 everywhere.
    """
    sublayers = cache.sublayers
    spectra = [cache.read_small(index, SPECTRA) for index in range(cache.num_layers)]

    def spectra_of(kind: str) -> list[torch.Tensor]:
        return [spectra[s.layer][f"{s.path}.{kind}"] for s in sublayers]

    if allocation == "loss":
        sigmas = spectra_of("two_sided_singular_values" if cache.has_gradients else "whitened_singular_values")
        return {target: loss_ranks(sigmas, sublayers, target, form) for target in targets}

    sigmas, whitened_sigmas = spectra_of("singular_values"), spectra_of("whitened_singular_values")
    weight_ranks = [rank_of(sigma, s.shape, rank_method) for sigma, s in zip(sigmas, sublayers, strict=True)]
    clusters = sublayer_clusters(cache, cluster_by)
    modulate = (modulation, lwe_strength, tail_redundancy_weight)

    def shares_at(target: float) -> list[float]:
        if allocation == "uniform":
            return project_shares(uniform_shares(sublayers, target), sublayers, target, form)
        shares = stage1_shares(sublayers, weight_ranks, target, alpha, form)
        stage1_ranks = ranks_from_shares(shares, sublayers, target, form)
        factors = stage2_factors(whitened_sigmas, stage1_ranks, clusters, *modulate)
        shares = [share * factor for share, factor in zip(shares, factors, strict=True)]
        return project_shares(shares, sublayers, target, form)

    return {target: ranks_from_shares(shares_at(target), sublayers, target, form) for target in targets}


def sublayer_clusters(cache: CalibrationCache, cluster_by: str) -> list[Hashable]:
    """The Stage 2 cluster of every sublayer: its `type`, or its type within a run of similar layers (`type_depth`)."""
    if cluster_by == "type":
        return [kind_of(s.path) for s in cache.sublayers]
    vectors = [cache.read_small(index, LEADING_VECTORS) for index in range(cache.num_layers)]
    depth = layer_clusters(vectors)
    return [(kind_of(s.path), depth[s.layer]) for s in cache.sublayers]


def compress(
    checkpoint: Checkpoint,
    cache: CalibrationCache,
    plans: dict[float, list[int]],
    writers: dict[float, ModelWriter],
    *,
    form: str,
    whitening: str,
    update: str,
    export: str,
    int6_mode: str,
    device: torch.device,
    activation_budget: float,
) -> None:
    """Write the factored shards of every target, layer by layer; shards from an interrupted run are kept.

    Several processes share the layers, or with `update` "sequential" the tokens.

    `update` "sequential" fits each layer to what the compressed layers below it deliver, see sequential_update;
    "none" decomposes each matrix once for all targets. `export` "dense" multiplies the factors back, "int6" stores
    every linear weight in INT6, fitted to its inputs (`int6_mode` "calibrated") or by the plain rule ("magnitude").

    Raises:
        HiSVDError: non-finite weights or activations, or a damaged cache.
    """
    ranks = {t: dict(zip((s.name for s in cache.sublayers), plan, strict=True)) for t, plan in plans.items()}
    done = [writer.shards_done() for writer in writers.values()]
    distributed.wait()  # until all have looked
    start, sequential = min(done), None
    changes = export == "int6" or any(
        not is_dense(plan[s.name], s.shape, form) for plan in ranks.values() for s in cache.sublayers
    )
    if update == "sequential" and changes and start < cache.num_layers:
        folders = {target: writer.folder for target, writer in writers.items()}
        in_step = max(done) <= start + 1  # else the files hold hidden states of several layers
        first_layer = start if in_step else 0
        sequential = SequentialUpdate(checkpoint, cache, folders, first_layer, device, activation_budget)
        start = sequential.first_layer
    first, processes = distributed.is_first(), distributed.count()
    indices = range(start, cache.num_layers)
    for index in tqdm(indices, "compressing layers", cache.num_layers, initial=start, disable=not first):
        mine = index % processes == distributed.index()
        if not sequential and (not mine or all(writer.has_shard(index) for writer in writers.values())):
            continue
        original = checkpoint.read(layer_tensor_names(checkpoint, cache.sublayers_of(index)[0]))
        if sequential:
            results = sequential.factor_layer(index, ranks, original, form, whitening, export, int6_mode)
        else:
            results = factor_layer(
                checkpoint, cache, index, ranks, original, form, whitening, export, int6_mode, device
            )
        shards = {target: dict(original) for target in plans}
        for target, sublayer, tensors in results:
            key = checkpoint.stored_name(f"{sublayer.name}.weight")
            del shards[target][key]
            shards[target] |= {f"{key.removesuffix('weight')}{name}": t.to("cpu") for name, t in tensors.items()}
        for target, shard in shards.items():
            if not writers[target].has_shard(index) and (first or not sequential):
                writers[target].write_shard(index, shard)
    inside = {n for i in range(cache.num_layers) for n in layer_tensor_names(checkpoint, cache.sublayers_of(i)[0])}
    for writer in writers.values():
        if first and not writer.has_shard(cache.num_layers):
            writer.write_shard(cache.num_layers, checkpoint.read(set(checkpoint.files) - inside))
    distributed.wait()


def factor_layer(
    checkpoint: Checkpoint,
    cache: CalibrationCache,
    index: int,
    ranks: dict[float, dict[str, int]],
    original: dict[str, torch.Tensor],
    form: str,
    whitening: str,
    export: str,
    int6_mode: str,
    device: torch.device,
) -> Iterator[tuple[float, Sublayer, dict[str, torch.Tensor]]]:
    """Yield (target, sublayer, state dict entries) for what is factored in layer `index`; one basis a matrix."""
    statistics = cache.read_layer(index)
    for members in cache.groups_of(index):
        factored = any(not is_dense(plan[s.name], s.shape, form) for plan in ranks.values() for s in members)
        fitted, weighed = export == "int6" and int6_mode == "calibrated", factored and whitening != "none"
        moment = input_moment(members[0], statistics, device) if fitted or weighed else None
        root = cholesky_root(moment, H_DAMPING) if weighed else None
        for s in members:
            weight = original[checkpoint.stored_name(f"{s.name}.weight")].to(device)
            f = basis = None
            for target, plan in ranks.items():
                tensors, rank = {"weight": weight}, plan[s.name]
                if not is_dense(rank, s.shape, form):
                    if basis is None:
                        f = output_moment(s, statistics, whitening, device)
                        basis = left_singular_vectors(whitened(weight, root, f))
                    factors = low_rank_factors(weight, basis, rank, f)
                    with naming(s.name):
                        stored_form = "dense" if export == "dense" else form
                        tensors = factor_tensors(*factors, stored_form, weight.dtype, root)
                if export == "int6":
                    tensors = int6_entries(tensors, moment if fitted else None)
                if tensors.get("weight") is not weight:
                    yield target, s, tensors


def layer_tensor_names(checkpoint: Checkpoint, first: Sublayer) -> set[str]:
    """Names of all checkpoint tensors of the decoder layer that `first` belongs to."""
    prefix = checkpoint.stored_name(f"{first.name}.weight").removesuffix(f"{first.path}.weight")
    return {name for name in checkpoint.files if name.startswith(prefix)}
