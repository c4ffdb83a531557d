"""The attention-residual study: exact variants on several families, and evaluate.py --attention_residual."""

import json
from functools import partial

import pytest
import torch
from conftest import HEADS, IDS, SHARED, build_model, expect_sentence, run
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MambaConfig, OPTConfig

import hisvd
from hisvd.attention_residual import (
    ResidualMoments,
    cumulative_variance,
    effective_dimension,
    full,
    low_rank,
    residual_spectra,
    residual_variants,
    study_windows,
    top_1,
)
from hisvd.cli import attention_study

# Weights large enough that attention shows in the logits.
GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
OPT = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 160, "num_hidden_layers": 4, "init_std": 0.2}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=300, **GPT2, scale_attn_by_inverse_layer_idx=True),
    "opt": OPTConfig(vocab_size=300, **OPT, num_attention_heads=4),
    "gemma2": Gemma2Config(**SHARED, **HEADS, head_dim=16, sliding_window=8, attn_logit_softcapping=0.5),
}
FAMILIES = ("gpt2", "opt", "gemma2", "llama", "mistral", "qwen2")
LAYERS = (1, 3)


@pytest.fixture(scope="module")
def models(model_folders, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("attention")
    own = {name: build_model(config, root / name, tokenizer) for name, config in CONFIGS.items()}
    folders = model_folders | own
    return {name: AutoModelForCausalLM.from_pretrained(folders[name]).eval() for name in FAMILIES}


@torch.no_grad()
def logits(model, variants=None):
    if variants is None:
        return model(IDS).logits
    with residual_variants(model, variants):
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_full_is_the_model_itself_and_afterwards_nothing_has_changed(models, family):
    model = models[family]
    before, implementation = logits(model), model.config._attn_implementation
    torch.testing.assert_close(logits(model, dict.fromkeys(LAYERS, full)), before, rtol=0, atol=1e-4)
    assert torch.equal(logits(model), before)
    assert model.config._attn_implementation == implementation
    assert not any(hasattr(module, "residual_variant") for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_lies_between_top_1_and_full(models, family):
    model = models[family]
    spectra = residual_spectra(model, IDS, LAYERS)

    def projected(rank):
        return logits(model, {i: partial(low_rank, v[..., :rank]) for i, (_, v) in spectra.items()})

    top, whole = (logits(model, dict.fromkeys(LAYERS, variant)) for variant in (top_1, full))
    assert not torch.allclose(top, whole, atol=1e-3)
    assert torch.equal(projected(0), top)
    torch.testing.assert_close(projected(spectra[1][1].shape[-1]), whole, rtol=0, atol=1e-4)
    errors = [(projected(rank) - whole).norm() for rank in (0, 8)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_top_1_and_moments_from_the_models_own_probabilities(models, family):
    """The definition, from the eager attentions that transformers returns and the values that v_proj computes."""
    model = models[family]
    attention, seen = model.model.layers[3].self_attn, {}
    handles = [
        attention.v_proj.register_forward_hook(lambda _, __, y: seen.update(values=y)),
        attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0])),
    ]
    moments = ResidualMoments()
    try:
        logits(model, {3: top_1})
        top = seen["heads"]
        with torch.no_grad(), residual_variants(model, {3: moments.variant(3)}):
            for row in IDS:
                model(row[None])
        model.set_attn_implementation("eager")
        with torch.no_grad():
            probabilities = model(IDS, output_attentions=True).attentions[3]
    finally:
        model.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()
    dim = attention.head_dim
    values = seen["values"].unflatten(-1, (2, dim)).transpose(1, 2).repeat_interleave(2, dim=1)
    expected = torch.stack(
        [torch.stack([values[b, h, probabilities[b, h].argmax(-1)] for h in range(4)]) for b in range(len(IDS))]
    )
    torch.testing.assert_close(top.unflatten(-1, (4, dim)).transpose(1, 2), expected, rtol=1e-5, atol=1e-6)
    residuals = probabilities @ values - expected
    rows = residuals.transpose(0, 1).flatten(1, 2).double()
    torch.testing.assert_close(moments.moments[3], rows.mT @ rows, rtol=1e-4, atol=1e-7)
    energies, vectors = moments.spectra()[3]
    singular_values, directions = torch.linalg.svd(rows, full_matrices=False)[1:]
    torch.testing.assert_close(energies.sqrt(), singular_values, rtol=1e-3, atol=1e-4)
    assert (vectors[..., 0] * directions[:, 0]).sum(-1).abs().min() > 1 - 1e-3


def test_model_is_restored_when_the_study_raises(models):
    model = models["llama"]
    before, config = logits(model), model.model.layers[3].self_attn.config

    def failing(residual):
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        logits(model, {1: full, 3: failing})
    assert model.model.layers[3].self_attn.config is config is model.config
    assert torch.equal(logits(model), before)


def test_variance_and_effective_dimension():
    energies = torch.tensor([[8.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(cumulative_variance(energies)[0], torch.tensor([0.8, 0.9, 1.0, 1.0]))
    assert effective_dimension(energies[:2]).tolist() == [2, 4]
    assert torch.isfinite(cumulative_variance(energies)).all()


def test_blocks_for_bases_and_for_perplexity_are_disjoint(models):
    settings = hisvd.StudySettings(seqlen=32, bos=7)
    basis, evaluated = study_windows(models["llama"], torch.arange(1000), settings)
    assert basis.shape == (4, 32) and evaluated.shape == (28, 32)
    assert basis[:, 1:].flatten().tolist() == list(range(4 * 31))
    assert evaluated[:, 1:].flatten().tolist() == list(range(4 * 31, 32 * 31))
    assert (basis[:, 0] == 7).all() and (evaluated[:, 0] == 7).all()
    basis, evaluated = study_windows(models["llama"], IDS, hisvd.StudySettings(seqlen=5, calib_blocks=1))
    assert torch.equal(basis, IDS[:1]) and torch.equal(evaluated, IDS[1:])


def test_study_of_a_loaded_model_as_a_function(models, capfd):
    model, windows = models["llama"], torch.randint(300, (4, 24), generator=torch.Generator().manual_seed(0))
    settings = hisvd.StudySettings(seqlen=24, n_blocks=2, calib_blocks=2, progress=False)
    study = hisvd.attention_residual_study(model, windows, [3, 1], [16, 0, 4], settings)
    assert study == hisvd.attention_residual_study(model, windows.flatten(), (1, 3), (0, 4, 16), settings)
    assert (study["layers"], study["basis_blocks"], study["blocks"], study["seqlen"]) == ([1, 3], 2, 2, 24)
    assert study["baseline"] == pytest.approx(study["full"], rel=1e-5)
    assert study["low_rank"][0]["perplexity"] == study["top_1"]
    assert capfd.readouterr() == ("", "")
    default = hisvd.attention_residual_study(model, windows, settings=settings)
    assert default["layers"] == [3] and [row["d_r"] for row in default["low_rank"]] == [1, 2, 4, 8, 16]
    with pytest.raises(hisvd.HiSVDError, match="129 exceeds the 128 positions"):
        hisvd.attention_residual_study(model, windows.flatten(), settings=hisvd.StudySettings(seqlen=129))
    with pytest.raises(hisvd.HiSVDError, match="4 windows"):
        hisvd.attention_residual_study(model, windows, settings=hisvd.StudySettings(calib_blocks=4))


def study_arguments(folder, *options):
    return ["--model_path", folder, "--datasets", "python-docs", "--attention_residual", "--seqlen", 32, *options]


def test_program_prints_what_it_writes(model_folders, tmp_path):
    options = ["--layers", "2,3", "--d_r", "0,4,16", "--n_blocks", 5, "--calib_blocks", 2]
    result = run("evaluate", *study_arguments(model_folders["llama"], *options), "--json", tmp_path / "r.json")
    assert result.code == 0, result
    study = json.loads((tmp_path / "r.json").read_text())[0]["attention_residual"]["python-docs"]
    assert (study["blocks"], study["basis_blocks"], study["tokens_scored"]) == (5, 2, 5 * 31)
    assert study["full"] == pytest.approx(study["baseline"], rel=1e-5)
    by_rank = {row["d_r"]: row["perplexity"] for row in study["low_rank"]}
    assert by_rank[0] == study["top_1"] and by_rank[16] == pytest.approx(study["full"], rel=1e-5)
    assert [(h["layer"], h["head"]) for h in study["heads"]] == [(i, h) for i in (2, 3) for h in range(4)]
    for head in study["heads"]:
        shares = head["cumulative_variance"]
        assert len(shares) == 16 and shares == sorted(shares) and shares[-1] == pytest.approx(1)
        assert shares[head["effective_dimension"] - 1] >= 0.9
    for figure in (study["baseline"], study["top_1"], *by_rank.values()):
        assert f"{figure:.3f}" in result.output
    assert "Verdict: " in result.output


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ((11.0, 10.5, 10.05), "d_r = 8 recovers 90%"),
        ((11.0, 10.9, 10.4), "the best is 60.0% at d_r = 8"),
        ((9.9, 9.9, 9.9), "costs no perplexity"),
    ],
)
def test_verdict(losses, sentence):
    top, *rest = losses
    rows = [
        {"d_r": rank, "recovered": (top - loss) / (top - 10) if top > 10 else None}
        for rank, loss in zip((4, 8), rest, strict=True)
    ]
    enough = next((row["d_r"] for row in rows if (row["recovered"] or 0) >= 0.9), None)
    assert sentence in attention_study.verdict({"baseline": 10.0, "top_1": top, "low_rank": rows, "enough": enough})


def test_plot_is_drawn(model_folders, tmp_path):
    options = ["--n_blocks", 2, "--calib_blocks", 1, "--plot", tmp_path / "study.png"]
    assert run("evaluate", *study_arguments(model_folders["llama"], *options)).code == 0
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    expect_sentence(
        run("evaluate", *study_arguments(model_folders["llama"]), "--plot", tmp_path / "study.txt"), "study.txt"
    )


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--layers", "4"], "--layers 4"),
        (["--layers", "-1"], "--layers -1"),
        (["--layers", "last"], "--layers 'last'"),
        (["--d_r", "17"], "16 dimensions"),
        (["--d_r", "-1"], "--d_r -1"),
        (["--d_r", "1,,2"], "--d_r '1,,2'"),
        (["--nsamples", "3"], "--nsamples"),
        (["--speed"], "--speed"),
        (["--calib_blocks", "100000"], "--calib_blocks"),
    ],
)
def test_bad_usage_of_the_study(model_folders, options, fragment):
    expect_sentence(run("evaluate", *study_arguments(model_folders["llama"], *options)), fragment)


def test_options_of_the_study_need_it(model_folders):
    where = ["--model_path", model_folders["llama"], "--datasets", "python-docs"]
    expect_sentence(run("evaluate", *where, "--d_r", 4), "--d_r needs --attention_residual")


def test_model_without_such_attention_is_refused(tokenizer, tmp_path):
    config = MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    folder = build_model(config, tmp_path / "mamba", tokenizer)
    expect_sentence(run("evaluate", *study_arguments(folder)), "mamba", "attention")
