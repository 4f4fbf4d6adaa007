"""Promise 11: the face acts on positive prompts and on nothing else, whatever guider, order or number of prompts.

Every prompt that a guider or an extra pass evaluates is compared with the same prompt evaluated by itself: the positive
ones with the patched model, all others with the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fusion_lab
import peer_ours
import prompt_passes
import pytest
import torch
from fusion_lab import FusionLab, relative
from prompt_passes import named

SIGMA = 3.0
EXTRA = {
    "DualCFGGuider": "nodes_custom_sampler", "BasicGuider": "nodes_custom_sampler", "CFGGuider": "nodes_custom_sampler",
    "DualModelGuider": "nodes_custom_sampler", "PerpNegGuider": "nodes_perpneg", "PerpNeg": "nodes_perpneg",
    "SelfAttentionGuidance": "nodes_sag", "PerturbedAttentionGuidance": "nodes_pag", "TCFG": "nodes_tcfg",
    "RescaleCFG": "nodes_model_advanced", "Mahiro": "nodes_mahiro", "CFGZeroStar": "nodes_cfg",
}  # fmt: skip
FORMS = {
    "fused": {}, "decoupled": {"combine": "decoupled"}, "training-free": {"adapter": "training-free"},
    "clean training-free": {"adapter": "training-free", "timestep": "clean"},
}  # fmt: skip


class Scene:
    """A lab with five prompts, and how guiders and patches are made of them."""

    def __init__(self, pack: Any, small_models: Any) -> None:
        self.host, self.lab = pack.host, FusionLab(pack, small_models, "sd15_tiny")
        names = ("positive", "negative", "middle", "empty")
        self.texts = {who: small_models.conditioning("sd15_tiny", seed=seed) for seed, who in enumerate(names, 1)}
        self.prompts = {who: named(text, who) for who, text in self.texts.items()}

    def node(self, name: str) -> Any:
        try:
            return getattr(self.host.extra(EXTRA[name]), name)
        except (AttributeError, ImportError):
            return pytest.skip(f"ComfyUI {self.host.version} has no {name}")

    def guider(self, name: str, model: Any, **inputs: Any) -> Any:
        node = self.node(name)
        if hasattr(node, "define_schema"):
            return peer_ours.run_node(node, model=model, **inputs)[0]
        return getattr(node(), node.FUNCTION)(model, **inputs)[0]

    def cfg(self, model: Any, cfg: float = 4.0) -> Any:
        return self.guider("CFGGuider", model, positive=self.p("positive"), negative=self.p("negative"), cfg=cfg)

    def p(self, who: str) -> Any:
        return self.prompts[who]

    def patched_by(self, name: str, model: Any, **inputs: Any) -> Any:
        return self.guider(name, model, **inputs)


GUIDERS: dict[str, Callable[[Scene, Any], Any]] = {
    "CFG": lambda s, m: s.cfg(m),
    "CFG 1": lambda s, m: s.cfg(m, 1.0),
    "Basic": lambda s, m: s.guider("BasicGuider", m, conditioning=s.p("positive")),
    "DualCFG": lambda s, m: s.guider(
        "DualCFGGuider", m, cond1=s.p("positive"), cond2=s.p("middle"), negative=s.p("negative"), cfg_conds=3.0,
        cfg_cond2_negative=2.0, style="regular",
    ),
    "DualCFG nested": lambda s, m: s.guider(
        "DualCFGGuider", m, cond1=s.p("positive"), cond2=s.p("middle"), negative=s.p("negative"), cfg_conds=3.0,
        cfg_cond2_negative=2.0, style="nested",
    ),
    "PerpNegGuider": lambda s, m: s.guider(
        "PerpNegGuider", m, positive=s.p("positive"), negative=s.p("negative"), empty_conditioning=s.p("empty"),
        cfg=4.0, neg_scale=1.0,
    ),
    "DualModel": lambda s, m: s.guider(
        "DualModelGuider", m, positive=s.p("positive"), negative=s.p("negative"), model_negative=m, cfg=4.0
    ),
    "DualModel, negative unpatched": lambda s, m: s.guider(
        "DualModelGuider", m, positive=s.p("positive"), negative=s.p("negative"), model_negative=s.lab.model, cfg=4.0
    ),
    "SAG": lambda s, m: s.cfg(s.patched_by("SelfAttentionGuidance", m, scale=0.5, blur_sigma=2.0)),
    "PAG": lambda s, m: s.cfg(s.patched_by("PerturbedAttentionGuidance", m, scale=3.0)),
    "PerpNeg": lambda s, m: s.cfg(s.patched_by("PerpNeg", m, empty_conditioning=s.p("empty"), neg_scale=1.0)),
    "TCFG": lambda s, m: s.cfg(s.patched_by("TCFG", m)),
    "RescaleCFG": lambda s, m: s.cfg(s.patched_by("RescaleCFG", m, multiplier=0.7)),
    "Mahiro": lambda s, m: s.cfg(s.patched_by("Mahiro", m)),
    "CFGZeroStar": lambda s, m: s.cfg(s.patched_by("CFGZeroStar", m)),
}  # fmt: skip
EVALUATED = {
    "CFG 1": ["positive"], "Basic": ["positive"], "DualCFG": ["negative", "middle", "positive"],
    "DualCFG nested": ["negative", "middle", "positive"], "PerpNegGuider": ["positive", "negative", "empty"],
    "DualModel": ["positive", "negative"], "DualModel, negative unpatched": ["positive", "negative"],
    "SAG": ["positive", "negative", "negative"], "PAG": ["positive", "negative", "positive"],
    "PerpNeg": ["positive", "negative", "empty"],
}  # fmt: skip


@pytest.fixture(scope="module")
def scene(pack: Any, small_models: Any) -> Scene:
    return Scene(pack, small_models)


@pytest.mark.parametrize("split", [False, True], ids=["together", "one by one"])
@pytest.mark.parametrize("guider", GUIDERS)
def test_promise_11_the_face_acts_on_positive_prompts_only(scene, guider, split, monkeypatch):
    check(scene, scene.lab.patch()[0], guider, split, monkeypatch)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "fused"])
@pytest.mark.parametrize("guider", ["CFG", "DualCFG", "PerpNegGuider", "SAG", "PAG"])
def test_promise_11_holds_in_every_form(scene, form, guider, monkeypatch):
    inputs = {**FORMS[form], **({"reference_size": 64} if "free" in form else {})}
    check(scene, scene.lab.patch(**inputs)[0], guider, False, monkeypatch)


@pytest.mark.parametrize("guider", ["CFG", "DualCFG", "SAG", "PerpNegGuider"])
def test_promise_11_holds_for_routed_people(scene, guider, monkeypatch):
    lab = scene.lab
    routed = lab.routed([lab.identity(0), lab.identity(1)], fusion_lab.halves())
    check(scene, lab.patch(routed=routed)[0], guider, False, monkeypatch)


def check(scene: Scene, patched: Any, guider: str, split: bool, monkeypatch: Any) -> None:
    made = GUIDERS[guider](scene, patched)
    if split:
        monkeypatch.setattr(scene.lab.model.model, "memory_required", lambda *_, **__: 1e30, raising=False)
    x = fusion_lab.noise(1, fusion_lab.LATENT, seed=5) * SIGMA
    with prompt_passes.evaluations() as seen:
        prompt_passes.one_step(made, SIGMA, x)
    assert [one.who for one in seen] == EVALUATED.get(guider, ["positive", "negative"])
    for one in seen:
        ours, plain = (prompt_passes.alone(model, scene.texts[one.who], one) for model in (patched, scene.lab.model))
        assert relative(ours, plain) > 1e-3, "the face can be told from none"
        assert relative(one.out, ours if one.who == "positive" else plain) < 1e-5, one.who


# Prompts of several parts: the host copies parts between the lists of a guider


def test_promise_11_an_area_of_the_positive_prompt_is_not_positive_in_the_negative_list(scene, small_models):
    """The host gives the negative list a part for every area of the positive one, under the positive's own uuid."""
    import nodes

    lab = scene.lab
    area = nodes.ConditioningSetArea().append(small_models.conditioning(lab.layout, seed=8), 32, 64, 32, 0, 1.0)[0]
    prompts = {"positive": scene.p("positive") + named(area, "positive"), "negative": scene.p("negative")}
    outs = {}
    for name, model in (("ours", lab.patch()[0]), ("plain", lab.model)):
        guider = scene.guider("CFGGuider", model, **prompts, cfg=4.0)
        with prompt_passes.evaluations() as seen:
            prompt_passes.one_step(guider, SIGMA, fusion_lab.noise(1, fusion_lab.LATENT, seed=5) * SIGMA)
        outs[name] = [one.out for one in seen]
        assert [len(one.conds) for one in seen] == [2, 2], "the host has copied the area"
    (ours_positive, ours_negative), (positive, negative) = outs["ours"], outs["plain"]
    assert torch.equal(ours_negative, negative) or relative(ours_negative, negative) < 1e-6
    assert relative(ours_positive, positive) > 1e-3


def test_promise_12_a_long_negative_prompt_does_not_weaken_the_face(scene, small_models):
    """The host repeats a short text to the length of the longest in the call; beside a face, copies would count."""
    lab, patched = scene.lab, scene.lab.patch()[0]
    long = small_models.conditioning(lab.layout, seed=2)
    long = [[torch.cat([long[0][0], long[0][0].flip(1)], 1), long[0][1]]]
    guider = scene.guider("CFGGuider", patched, positive=scene.p("positive"), negative=named(long, "negative"), cfg=4.0)
    with prompt_passes.evaluations() as seen, lab.counted_passes() as rows:
        prompt_passes.one_step(guider, SIGMA, fusion_lab.noise(1, fusion_lab.LATENT, seed=5) * SIGMA)
    assert 2 in rows, "both prompts are in one call"
    wanted = prompt_passes.alone(patched, scene.texts["positive"], seen[0])
    assert relative(seen[0].out, wanted) < 1e-5
    assert relative(wanted, prompt_passes.alone(lab.model, scene.texts["positive"], seen[0])) > 1e-3


def test_promise_12_each_of_two_positive_prompts_gives_its_own_text_to_the_reference(scene, small_models, monkeypatch):
    """Together or one by one, as memory allows: the reference reads the prompt that its rows read (METHOD 1.2)."""
    lab = scene.lab
    patched, _ = lab.patch(adapter="training-free", reference_size=64)
    other = small_models.conditioning(lab.layout, seed=9)
    outs = []
    for split in (False, True):
        if split:
            monkeypatch.setattr(lab.model.model, "memory_required", lambda *_, **__: 1e30, raising=False)
        guider = scene.guider(
            "CFGGuider", patched, positive=scene.p("positive") + named(other, "positive"), negative=scene.p("negative"),
            cfg=4.0,
        )  # fmt: skip
        with prompt_passes.evaluations() as seen:
            prompt_passes.one_step(guider, SIGMA, fusion_lab.noise(1, fusion_lab.LATENT, seed=5) * SIGMA)
        outs.append(seen[0])
    assert relative(outs[0].out, outs[1].out) < 1e-5
    each = [prompt_passes.alone(patched, text, outs[0]) for text in (scene.texts["positive"], other)]
    assert relative(outs[0].out, (each[0] + each[1]) / 2) < 1e-5
    assert relative(*each) > 1e-3
