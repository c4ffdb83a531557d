"""What a run will need, from the model's config alone: the stages of the chain at this machine's speed."""

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hisvd.component.families import adapter_for
from hisvd.machine_rates import Rates, Work, measure_rates
from hisvd.settings import CalibrationSettings, Resources
from hisvd.stage_estimates import Layer, RunSizes, Shapes, Stage, estimated_stages
from hisvd.tuning_text import pass_dtype
from hisvd.utils.model_folders import local_folder
from hisvd.utils.model_utils import (
    check_calibratable,
    empty_model,
    read_config,
    resolve_device,
    resolve_dtype,
    stored_dtype,
)
from hisvd.utils.streaming import decoder_layers


@dataclass(frozen=True)
class Estimate:
    """What the stages take on a device with the given rates."""

    model_type: str
    shapes: Shapes
    sizes: RunSizes
    device: torch.device
    rates: Rates
    stages: list[Stage]

    def seconds(self, stage: Stage) -> float:
        """The time that `stage` takes."""
        return self.rates.seconds(stage.work)


def estimate(
    model: str | os.PathLike,
    settings: CalibrationSettings = CalibrationSettings(),
    resources: Resources = Resources(),
) -> Estimate:
    """Estimate memory, disk and time of a model's calibration, compression and evaluation, without its weights.

    Reads config.json alone, and measures the device for some seconds. Compression is to one target with default
    settings, with what `refine="weights"` adds as a stage of its own; evaluation layer by layer on WikiText-2.

    Args:
        model: A model folder, or a Hub id.
        settings: How much text is calibrated on, and in which dtype.
        resources: The device.

    Returns:
        The estimate: its `stages` have `memory` and `disk` in bytes, and `estimate.seconds(stage)` is the time of one.

    Raises:
        HiSVDError: no usable config.json, an unknown device, or a family that cannot be compressed.

    Example:
        >>> import hisvd
        >>> needs = hisvd.estimate("models/llama-7b", hisvd.CalibrationSettings(nsamples=128, seqlen=2048))
        >>> [stage.name for stage in needs.stages if stage.memory > 24e9]
        []
    """
    device = resolve_device(resources.device)
    config = read_config(local_folder(os.fspath(model), config_only=True))
    check_calibratable(config, settings.seqlen, os.fspath(model))
    stored = stored_dtype(config)
    compute = resolve_dtype(settings.dtype, device, stored) or stored
    windows = settings.nsamples, settings.gradient_windows, settings.seqlen
    sizes = RunSizes(*windows, compute, stored, tuning=pass_dtype(compute, device))
    shapes = shapes_of(empty_model(config))
    stages = estimated_stages(shapes, sizes)
    rates = measure_rates(device, sum((stage.work for stage in stages), Work()))
    return Estimate(config.model_type, shapes, sizes, device, rates, stages)


def shapes_of(model: PreTrainedModel) -> Shapes:
    """The shapes of a model made by empty_model.

    Raises:
        HiSVDError: the family cannot be compressed.
    """
    model.tie_weights()  # the meta device has undone it, and a tied head would count twice
    adapter = adapter_for(model)
    layers = []
    for layer in decoder_layers(model, adapter):
        groups = adapter.groups(layer) or {path: (path,) for path in adapter.sublayer_paths(layer)}
        weights = [[layer.get_parameter(f"{path}.weight") for path in paths] for paths in groups.values()]
        inputs = [(group[0].shape[1], [w.shape[0] for w in group]) for group in weights]
        mlps = [
            [
                (len(w), w.shape[1])
                for w in (layer.get_parameter(f"{path}.weight") for path in (*mlp.inputs, mlp.output))
            ]
            for mlp in adapter.mlps_of(layer)
        ]
        parameters = sum(p.numel() for p in layer.parameters())
        layers.append(Layer(inputs, parameters, [(mlp[-1][1], mlp) for mlp in mlps]))
    text = model.config.get_text_config()
    outside = sum(p.numel() for p in model.parameters()) - sum(layer.parameters for layer in layers)
    return Shapes(layers, text.hidden_size, text.vocab_size, outside)
