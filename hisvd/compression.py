"""Plan the ranks from the cache, then factor the model layer by layer into shards."""

from collections.abc import Hashable, Sequence

import torch
from tqdm import tqdm

from hisvd.calibration_cache import LEADING_VECTORS, SPECTRA, CalibrationCache
from hisvd.clustering import layer_clusters
from hisvd.component.low_rank import factor_tensors
from hisvd.rank_allocation import loss_ranks, project_shares, ranks_from_shares, stage1_shares, uniform_shares
from hisvd.rank_metrics import rank_of
from hisvd.refinement import stage2_shares
from hisvd.shape_utils import FactorForm, Sublayer, is_dense
from hisvd.utils.model_utils import Checkpoint
from hisvd.utils.save_utils import ModelWriter
from hisvd.whitening_svd import (
    F_DAMPING,
    H_DAMPING,
    SecondMoment,
    damped,
    left_singular_vectors,
    low_rank_factors,
    whitened,
)


def plan_ranks(
    cache: CalibrationCache,
    targets: Sequence[float],
    *,
    form: FactorForm,
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
        return [spectra[s.layer][f"{s.type}.{kind}"] for s in sublayers]

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
        return stage2_shares(sublayers, shares, whitened_sigmas, clusters, target, form, *modulate)

    return {target: ranks_from_shares(shares_at(target), sublayers, target, form) for target in targets}


def sublayer_clusters(cache: CalibrationCache, cluster_by: str) -> list[Hashable]:
    """The Stage 2 cluster of every sublayer: its `type`, or its type within a run of similar layers (`type_depth`)."""
    if cluster_by == "type":
        return [s.type for s in cache.sublayers]
    vectors = [cache.read_small(index, LEADING_VECTORS) for index in range(cache.num_layers)]
    depth = layer_clusters(vectors)
    return [(s.type, depth[s.layer]) for s in cache.sublayers]


def compress(
    checkpoint: Checkpoint,
    cache: CalibrationCache,
    plans: dict[float, list[int]],
    writers: dict[float, ModelWriter],
    *,
    form: FactorForm,
    whitening: str,
    export: str,
    device: torch.device,
) -> None:
    """Write the factored shards of every target, one decoder layer in memory, each matrix decomposed once.

    Shards that a writer has from an interrupted run are kept. `export` "dense" multiplies the factors back.

    Raises:
        HiSVDError: non-finite weights, or a damaged cache.
    """
    rank_tables = {t: dict(zip((s.name for s in cache.sublayers), ranks, strict=True)) for t, ranks in plans.items()}
    rest = set(checkpoint.files)
    for index in tqdm(range(cache.num_layers), "compressing layers"):
        sublayers = cache.sublayers_of(index)
        names = layer_tensor_names(checkpoint, sublayers[0])
        rest -= names
        open_targets = [t for t in plans if not writers[t].has_shard(index)]
        if not open_targets:
            continue
        original = checkpoint.read(names)
        statistics = cache.read_layer(index)
        shards = {t: dict(original) for t in open_targets}
        for sublayer in sublayers:
            key = checkpoint.stored_name(f"{sublayer.name}.weight")
            ranks = {t: rank_tables[t][sublayer.name] for t in open_targets}
            factored = {t: r for t, r in ranks.items() if not is_dense(r, sublayer.shape, form)}
            if not factored:
                continue
            weight = original[key].to(device)
            h, f = second_moments(sublayer, statistics, whitening, device)
            basis = left_singular_vectors(whitened(weight, h, f))
            for target, rank in factored.items():
                left, right = low_rank_factors(weight, basis, rank, f)
                del shards[target][key]
                for name, tensor in exported(left, right, form, export).items():
                    stored = tensor.to("cpu", weight.dtype if tensor.is_floating_point() else tensor.dtype)
                    shards[target][f"{key.removesuffix('weight')}{name}"] = stored
        for target, shard in shards.items():
            writers[target].write_shard(index, shard)
    for writer in writers.values():
        if not writer.has_shard(cache.num_layers):
            writer.write_shard(cache.num_layers, checkpoint.read(rest))


def layer_tensor_names(checkpoint: Checkpoint, first: Sublayer) -> set[str]:
    """Names of all checkpoint tensors of the decoder layer that `first` belongs to."""
    prefix = checkpoint.stored_name(f"{first.name}.weight").removesuffix(f"{first.type}.weight")
    return {name for name in checkpoint.files if name.startswith(prefix)}


def second_moments(
    sublayer: Sublayer, statistics: dict[str, torch.Tensor], whitening: str, device: torch.device
) -> tuple[SecondMoment | None, SecondMoment | None]:
    """(H, F) of a sublayer as `whitening` wants them: `two_sided`, `input` (no F) or `none`."""

    def moment(prefix: str, damping: float) -> SecondMoment:
        return damped(*(statistics[f"{prefix}{k}"].to(device) for k in ("eigenvalues", "eigenvectors")), damping)

    h = moment(f"{sublayer.input_group}.", H_DAMPING) if whitening != "none" else None
    f = moment(f"{sublayer.type}.F_", F_DAMPING) if whitening == "two_sided" else None
    return h, f


def exported(left: torch.Tensor, right: torch.Tensor, form: FactorForm, export: str) -> dict[str, torch.Tensor]:
    """State dict entries for a pair of factors: those of the factored module, or one dense `weight`."""
    return {"weight": left @ right} if export == "dense" else factor_tensors(left, right, form)
