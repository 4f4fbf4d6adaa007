"""The diffusion prior behind the text branch: the same numbers as diffusers' own pipeline, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.host

WIDTH = 16


@pytest.fixture
def text(pack):
    return pack.submodule("nodes.guidance_text")


@pytest.fixture(scope="module")
def prior_file(tmp_path_factory) -> Path:
    """A tiny random PriorTransformer as diffusers saves it."""
    from diffusers import PriorTransformer

    torch.manual_seed(0)
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=WIDTH)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("prior")
    prior.save_pretrained(folder)
    return folder / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def prior_module(pack):
    return pack.submodule("nodes.prior")


def chunk(text, seed: int, count: int):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return text.TextChunk(draw(1, WIDTH), draw(1, 77, WIDTH), (torch.arange(77) < count)[None])


def test_a_prior_loads_as_diffusers_loads_it(prior_module, prior_file, text):
    from diffusers import PriorTransformer

    theirs, ours = PriorTransformer.from_pretrained(prior_file.parent).eval(), prior_module.load_prior(prior_file)
    arguments = {"steps": 4, "scale": 3.0, "seed": 5}
    results = [prior_module.sample_prior(p, chunk(text, 1, 6), chunk(text, 2, 2), **arguments) for p in (theirs, ours)]
    assert torch.equal(*results)


def test_the_sampling_loop_is_the_unclip_pipelines(prior_module, prior_file, text):
    """diffusers' own pipeline, stopped after its prior, gives the same embedding."""
    from types import SimpleNamespace

    from diffusers import UnCLIPScheduler
    from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline

    class AfterPriorError(Exception):
        pass

    def stop(image_embeddings, **_):
        raise AfterPriorError(image_embeddings)

    prompt, empty = chunk(text, 1, 6), chunk(text, 2, 2)
    prior = prior_module.load_prior(prior_file)
    scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    both = [torch.cat([getattr(c, n) for c in (empty, prompt)]) for n in ("embedding", "hidden", "mask")]
    stand_in = SimpleNamespace(
        _execution_device="cpu", prior=prior, prior_scheduler=scheduler, text_proj=stop, progress_bar=lambda x: x,
        _encode_prompt=lambda *_: both, prepare_latents=UnCLIPPipeline.prepare_latents.__get__(object()),
    )  # fmt: skip
    with pytest.raises(AfterPriorError) as reached:
        UnCLIPPipeline.__call__.__wrapped__(
            stand_in, prompt="x", prior_num_inference_steps=6, prior_guidance_scale=4.0,
            generator=torch.Generator().manual_seed(9),
        )  # fmt: skip
    ours = prior_module.sample_prior(prior, prompt, empty, steps=6, scale=4.0, seed=9)
    torch.testing.assert_close(ours, reached.value.args[0])


def test_the_prior_reports_every_step(prior_module, prior_file, text):
    seen = []
    prior = prior_module.load_prior(prior_file)
    prior_module.sample_prior(
        prior, chunk(text, 1, 6), chunk(text, 2, 2), steps=3, scale=1.0, seed=0, on_step=lambda *s: seen.append(s)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_remembered_prior_result_is_not_computed_again(prior_module, prior_file, text, monkeypatch):
    loads = []
    original = prior_module.load_prior
    monkeypatch.setattr(prior_module, "load_prior", lambda path: loads.append(path) or original(path))
    arguments = {"steps": 2, "scale": 2.0, "style_width": WIDTH, "towers": "tiny (16)"}
    ask = lambda seed: prior_module.text_to_image_space(  # noqa: E731
        prior_file, [chunk(text, 1, 6)], chunk(text, 2, 2), seed=seed, **arguments
    )
    first, again, other = ask(1), ask(1), ask(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(loads) == 2


def test_without_prior_the_projected_text_is_used(prior_module, text):
    chunks = [chunk(text, 1, 6), chunk(text, 2, 6)]
    got = prior_module.text_to_image_space(
        None, chunks, chunks[0], steps=1, scale=1.0, seed=0, style_width=WIDTH, towers="tiny (16)"
    )
    torch.testing.assert_close(got, (chunks[0].embedding + chunks[1].embedding) / 2)


def test_a_prior_of_the_wrong_width_is_refused_with_both_numbers(prior_module, prior_file, text):
    with pytest.raises(ValueError, match=r"16 numbers.*1792 \(ViT-L/14 \+ RN101\)"):
        prior_module.text_to_image_space(
            prior_file, [chunk(text, 1, 6)], chunk(text, 2, 2), steps=1, scale=1.0, seed=0, style_width=1792,
            towers="ViT-L/14 + RN101",
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"16 numbers.*768"):
        prior_module.check_text_width(768, WIDTH, prior_name="tiny")


def test_files_that_are_no_prior_are_refused(prior_module, prior_file, tmp_path):
    save_file({"input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=r"unet\.safetensors is no diffusion prior.*Karlo"):
        prior_module.load_prior(tmp_path / "unet.safetensors")
    broken = tmp_path / "prior.safetensors"
    broken.write_bytes(prior_file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="truncated"):
        prior_module.load_prior(broken)
    broken.write_bytes(prior_file.read_bytes())
    with pytest.raises(ValueError, match=r"heads of 64.*config\.json"):
        prior_module.load_prior(broken)
    (tmp_path / "config.json").write_text("[" * 100000)
    with pytest.raises(ValueError, match=r"config\.json beside the prior"):
        prior_module.load_prior(broken)
