"""Placement on a GPU, checked without one: the programs run on tensors that only claim to be there.

`pytest -rP tests/test_placement.py` shows where the host waits for the GPU, and how often, for every run.
"""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import HEADS, Result, build_model, calibrate_arguments, run, saved_tensors
from fake_accelerator import Record, fake_accelerator
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from hisvd import tuning_text
from hisvd.pivoting import pack_pivoted

# In older versions attention makes its causal mask in C++, to which the fake accelerator is a CPU.
pytestmark = pytest.mark.skipif(torch.__version__ < (2, 7), reason="the fake accelerator needs PyTorch 2.7")

# All linears have 64 inputs, the fewest that INT6 accepts, because codes are fitted in many small steps.
SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, **HEADS}
TINY = {"initializer_range": 0.1}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, **TINY, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SIZES, **TINY, num_local_experts=2, num_experts_per_tok=1),
    "gpt2": GPT2Config(vocab_size=300, n_embd=64, n_inner=64, n_layer=2, n_head=4, **TINY),
}
MATRICES = {"llama": 14, "mixtral": 20, "gpt2": 8}
PASSES = {"norms": 6, "weights": 6}  # that read all weights again, by output
WAITS = 32  # per matrix, at one place: less than a loop over its columns or chunks would make
EXPORTS = {
    "none": ["--target_compression", "0.8,0.5"],
    "dense": ["--target_compression", "0.8", "--export", "dense"],
    "int6": ["--target_compression", "0.8", "--export", "int6", "--quality_gate_delta", "none"],
    "gate": ["--target_compression", "0.8", "--export", "int6", "--quality_gate_delta", "1"],
}
# The outputs of compress.py and their options.
OUTPUTS = {
    f"{update}_{export}": ["--update", update, *options]
    for update in ("none", "sequential")
    for export, options in EXPORTS.items()
} | {
    "svd.pt": ["--target_compression", "0.6", "--factors", "svd", "--whitening", "input", "--allocation", "hisvd"],
    "norms": ["--target_compression", "0.6", "--update", "none", "--refine", "norms"],
    "weights": ["--target_compression", "0.6", "--update", "none", "--refine", "weights"],
    "plain.pt": ["--target_compression", "0.6", "--update", "none", "--whitening", "none", "--allocation", "uniform"],
}
# Where codes are fitted to the inputs; elsewhere they follow the plain rule, as fitting takes seconds.
FITTED = {("llama", "sequential_int6"), ("gpt2", "none_gate")}
TEXT = ["--datasets", "python-docs", "--seqlen", 32]

# Operations on x = [1, 2, 3] on the accelerator, and how many mismatches, syncs and uploads each of them is.
OPERATIONS: dict[str, tuple[Callable[[torch.Tensor], object], tuple[int, int, int]]] = {
    "sum with a CPU tensor": (lambda x: x + torch.ones(3), (1, 0, 0)),
    "product with a CPU tensor": (lambda x: torch.ones(3, 3) @ x, (1, 0, 0)),
    "into a CPU tensor": (lambda x: torch.ones(3).add_(x), (1, 0, 0)),
    "into a CPU number": (lambda x: torch.tensor(1.0).add_(x[0]), (1, 0, 0)),
    "beside a CPU tensor": (lambda x: torch.cat([x, torch.ones(1)]), (1, 0, 0)),
    "module on the CPU": (lambda x: nn.Linear(3, 3)(x), (1, 0, 0)),
    "in inference mode": (lambda x: in_inference_mode(lambda: nn.functional.linear(x, torch.ones(3, 3))), (1, 0, 0)),
    "entries of a CPU tensor": (lambda x: torch.ones(4)[x.long()], (1, 0, 0)),
    "entries by a CPU number": (lambda x: x.index_select(0, torch.tensor(0)), (1, 0, 0)),
    "draws of a CPU generator": (lambda x: torch.rand(3, device=x.device, generator=torch.Generator()), (1, 0, 0)),
    "CPU numbers": (lambda x: torch.where(x > 2, x * torch.tensor(2.0), 1.0).clamp_min(torch.tensor(0.0)), (0, 0, 0)),
    "a CPU number written": (lambda x: x.clone().index_put_((x.long() - 1,), torch.tensor(2.0)), (0, 0, 0)),
    "tensors made there": (
        lambda x: x + torch.ones_like(x) + x.new_zeros(3) + torch.arange(3, device="cuda"),
        (0, 0, 0),
    ),
    "a tensor made on the CPU": (lambda x: torch.zeros_like(x, device="cpu") + torch.ones(3), (0, 0, 0)),
    "item": (lambda x: x.sum().item(), (0, 1, 0)),
    "condition": (lambda x: bool((x > 0).all()), (0, 1, 0)),
    "condition in inference mode": (lambda x: in_inference_mode(lambda: bool((x > 0).all())), (0, 1, 0)),
    "list": (lambda x: x.tolist(), (0, 1, 0)),
    "to the CPU": (lambda x: x.cpu().numpy(), (0, 1, 0)),
    "copy into a CPU tensor": (lambda x: torch.zeros(3).copy_(x), (0, 1, 0)),
    "entries by a mask": (lambda x: x[x > 1], (0, 1, 0)),
    "comparison": (lambda x: torch.equal(x, x.clone()), (0, 1, 0)),
    "decomposition with a check": (lambda x: torch.linalg.cholesky(torch.diag(x)), (0, 1, 0)),
    "synchronize": (lambda x: torch.accelerator.synchronize(), (0, 1, 0)),
    "from the CPU": (lambda x: torch.ones(3).to(x.device) + torch.ones(3).to(x) + x.type_as(x), (0, 0, 2)),
    "from a list": (lambda x: torch.tensor([1.0, 2.0], device=x.device)[0] + x.new_tensor([1.0]), (0, 0, 2)),
    "entries by a list": (lambda x: x[[0, 2]], (0, 0, 1)),
}


def in_inference_mode(function: Callable[[], object]) -> object:
    with torch.inference_mode():
        return function()


def record_of(operation: str) -> Record:
    """To run in the other process: what the fake accelerator records for one of OPERATIONS."""
    with fake_accelerator() as record:
        OPERATIONS[operation][0](torch.arange(1.0, 4.0, device="cuda"))
    return record


def run_on_accelerator(program: str, *arguments: object) -> tuple[Result, Record]:
    """To run in the other process: a program, and what the fake accelerator records for it."""
    with fake_accelerator() as record:
        return run(program, *arguments, "--device", "cuda:0"), record


@pytest.fixture(scope="module")
def other_process():
    """A worker that is free to patch torch."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_fake_notes_mismatches_syncs_and_uploads(other_process, operation):
    record = other_process.submit(record_of, operation).result()
    assert tuple(events.total() for events in vars(record).values()) == OPERATIONS[operation][1], str(record)
    assert all(place.startswith("tests/test_placement.py:") for events in vars(record).values() for _, place in events)


def refusal_of_numpy() -> str:
    with fake_accelerator(), pytest.raises(TypeError) as error:
        torch.ones(3, device="cuda").numpy()
    return str(error.value)


def test_numpy_takes_no_tensor_on_the_accelerator(other_process):
    assert "can't convert cuda:0" in other_process.submit(refusal_of_numpy).result()


def gradients_on(device: str) -> list[torch.Tensor]:
    """Gradients of a network with tied weights, made on the CPU, moved and copied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8, bias=False))
    model[2].weight = model[0].weight
    model = copy.deepcopy(model.to(device))
    assert model[2].weight is model[0].weight and isinstance(model[2].weight, nn.Parameter)
    model(torch.arange(8, device=device)).logsumexp(-1).sum().backward()
    assert all(p.device == p.grad.device == torch.device(device) for p in model.parameters())
    return [p.grad.cpu() for p in model.parameters()]


def logits_on(device: str, folder: Path) -> torch.Tensor:
    """Logits of a model that transformers loads onto the device, for few tokens: INT6 has another product for those."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device)
    with torch.compiler.set_stance("force_eager"):
        return model(torch.arange(3, device=device)[None]).logits.detach().cpu()


def on_accelerator(function: Callable[..., object], *arguments: object) -> object:
    """To run in the other process: what a function returns on the accelerator, without any mismatch."""
    with fake_accelerator() as record:
        result = function("cuda:0", *arguments)
    assert not record.mismatches, str(record)
    return result


def test_modules_move_and_gradients_are_those_of_the_cpu(other_process):
    gradients = other_process.submit(on_accelerator, gradients_on).result()
    assert all(map(torch.equal, gradients, gradients_on("cpu")))


def record_of_packing() -> Record:
    left = torch.randn(200, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with fake_accelerator() as record:
        list(pack_pivoted(left.to("cuda"), [40]))
    return record


def test_packing_waits_once_per_exchange_and_copies_nothing(other_process):
    record = other_process.submit(record_of_packing).result()
    waits = Counter(place for _, place in record.syncs.elements())
    exchanges, others = waits.most_common(1)[0][1], 2
    assert exchanges > 8 and record.syncs.total() <= exchanges + others, str(record)
    assert record.uploads.total() == 2, str(record)  # `left`, and the order of the rows


@dataclass
class Chain:
    """A calibrated model, and what the programs make of it: on the CPU under root/cpu, on the GPU under root/gpu."""

    family: str
    model: Path
    root: Path
    other_process: Executor
    done: set[str] = field(default_factory=set)

    def run_on_gpu(self, program: str, *arguments: object, passes: int = 1) -> None:
        """Run a program on the accelerator; no operation may have arguments on different devices.

        Nor may the host wait for it in a loop over parts of a matrix; copies to it count as waiting. `passes` is how
        often the program reads all weights.
        """
        result, record = self.other_process.submit(run_on_accelerator, program, *arguments).result()
        assert result.code == 0, result
        print(record)
        assert not record.mismatches, str(record)
        waits = Counter(place for _, place in (record.syncs + record.uploads).elements())
        assert max(waits.values(), default=0) <= passes * WAITS * MATRICES[self.family], str(record)

    def run(self, program: str, arguments: Callable[[Path], Sequence[object]], passes: int = 1) -> None:
        """Run a program on both devices, with `arguments` of the folder that holds their results."""
        result = run(program, *arguments(self.root / "cpu"), "--device", "cpu")
        assert result.code == 0, result
        self.run_on_gpu(program, *arguments(self.root / "gpu"), passes=passes)

    def compress(self, output: str) -> None:
        """Make one of OUTPUTS on both devices, unless it exists."""
        fitted = (self.family, output) in FITTED
        options = OUTPUTS[output] + ([] if fitted or "int6" not in OUTPUTS[output] else ["--int6_mode", "magnitude"])

        def arguments(folder: Path) -> list[object]:
            where = ["--model_path", self.model, "--calib_cache", folder / "tiny_n6_s32_with_hessian"]
            return [*where, "--save_model", folder / output, *options]

        if output not in self.done:
            self.run("compress", arguments, PASSES.get(output, 1))
            self.done.add(output)

    def figures(self, name: str) -> tuple[list[dict], list[dict]]:
        """What evaluate.py wrote on the CPU and on the GPU."""
        cpu, gpu = (json.loads((self.root / device / name).read_text()) for device in ("cpu", "gpu"))
        assert {result["device"] for result in gpu} == {"cuda:0"}
        return cpu, gpu

    def assert_same_tensors(self, outputs: str) -> None:
        """The outputs that match a pattern hold the same tensors on both devices."""
        cpu, gpu = (tensors_of((self.root / device).glob(outputs)) for device in ("cpu", "gpu"))
        assert cpu and cpu.keys() == gpu.keys()
        for name, tensor in cpu.items():
            # Bit for bit except eigenvalues: for tensor subclasses PyTorch computes them together with vectors.
            torch.testing.assert_close(gpu[name], tensor, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def tensors_of(outputs: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors of folders and .pt files, keyed by the names of their file and their own."""
    tensors = {}
    for path in outputs:
        for file in [path] if path.is_file() else path.glob("*.safetensors"):
            content = saved_tensors(file) if path.is_file() else load_file(file)
            tensors |= {f"{path.name}/{file.name}: {name}": tensor for name, tensor in content.items()}
    return tensors


@pytest.fixture(scope="module", params=FAMILIES)
def chain(request, tokenizer, tmp_path_factory, other_process):
    root = tmp_path_factory.mktemp(request.param)
    made = Chain(request.param, build_model(FAMILIES[request.param], root / "model", tokenizer), root, other_process)
    made.run("calibrate", lambda folder: calibrate_arguments(made.model, folder))
    return made


def test_calibration(chain):
    chain.assert_same_tensors("tiny_*")


@pytest.mark.parametrize("output", OUTPUTS)
def test_compression(chain, output, monkeypatch):
    monkeypatch.setattr(tuning_text, "multiplies_bfloat16", lambda device: False)  # as on the accelerator
    if output in PASSES and chain.family != "mixtral":
        pytest.skip("takes long, and one family shows where things are")
    chain.compress(output)
    chain.assert_same_tensors(f"{output}*")


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "offload_folder"])
def test_perplexity(chain, streamed):
    for output in ("sequential_int6", "none_dense", "svd.pt"):
        chain.compress(output)

    def arguments(folder: Path) -> list[object]:
        outputs = ["sequential_int6", "none_dense"] + ["svd.pt"] * (not streamed)
        models = [part for model in (chain.model, *(folder / o for o in outputs)) for part in ("--model_path", model)]
        where = ["--offload_folder", folder / "offload"] if streamed else []
        return [*models, *TEXT, "--nsamples", 3, "--json", folder / "evaluation.json", *where]

    chain.run("evaluate", arguments)
    for cpu, gpu in zip(*chain.figures("evaluation.json"), strict=True):
        assert gpu["perplexity"]["python-docs"] == pytest.approx(cpu["perplexity"]["python-docs"], rel=1e-6)


def test_attention_study(chain):
    def arguments(folder: Path) -> list[object]:
        study = ["--attention_residual", "--n_blocks", 2, "--calib_blocks", 2, "--d_r", "1,2"]
        return ["--model_path", chain.model, *TEXT, *study, "--json", folder / "study.json"]

    chain.run("evaluate", arguments)
    cpu, gpu = (results[0]["attention_residual"]["python-docs"] for results in chain.figures("study.json"))
    for key in ("baseline", "top_1", "full"):
        assert gpu[key] == pytest.approx(cpu[key], rel=1e-6)
    assert [row["perplexity"] for row in gpu["low_rank"]] == pytest.approx(
        [row["perplexity"] for row in cpu["low_rank"]], rel=1e-6
    )


def test_transformers_loads_onto_the_accelerator(chain):
    chain.compress("sequential_int6")
    for folder in (chain.model, chain.root / "gpu" / "sequential_int6"):
        logits = chain.other_process.submit(on_accelerator, logits_on, folder).result()
        torch.testing.assert_close(logits, logits_on("cpu", folder))


def test_speed(chain):
    chain.run_on_gpu("evaluate", "--model_path", chain.model, *TEXT, "--nsamples", 1, "--speed")


def test_half_precision(tokenizer, tmp_path, other_process):
    """Factors of a bfloat16 model are rounded with feedback, column by column."""
    model = build_model(FAMILIES["llama"], tmp_path / "model", tokenizer, torch.bfloat16)
    chain = Chain("llama", model, tmp_path, other_process)
    options = ["--dtype", "bfloat16", "--activation_budget_gb", 1]
    chain.run("calibrate", lambda folder: [*calibrate_arguments(model, folder), *options])
    for output in ("svd.pt", "plain.pt"):
        chain.compress(output)
        chain.assert_same_tensors(output)
