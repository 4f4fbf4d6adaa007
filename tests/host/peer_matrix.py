"""The matrix of other people's nodes beside ours: what a graph, a form of ours and a row of the matrix are.

A run is one Euler step from a fixed noise level to zero, so its samples are the guided prediction itself. The right
value of a pair is never "it looks alike": it is a sum of contributions at a layer, a composition by hand of the
predictions of single prompts, or equality. `Row.check` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import fusion_lab
import guidance_lab
import peer_ours
import torch
from torch import Tensor

SEED = 7
SIGMAS = (3.0, 0.0)
LATENT = (8, 4)  # not square, so that nobody can take the one side for the other
PLAIN = "none of ours"
STAND_IN = "stand-in"
"""The pack of rows that are our own."""
SAID_TO_ALL = ("community", "separation")
"""Forms that also change prompts which are not positive, by what they are."""
ATTN1 = ("training-free", "separation")
"""Forms that act in self-attention."""
FORMS = ("fused", "community", "training-free", "routed", "separation", "guidance")


@dataclass(frozen=True, eq=False)
class Graph:
    """What reaches the sampler. hw: size of the latent. sampled: how, when it is not this file's one step.

    part: (y, x, height, width) of the latent, when only that is sampled, of a picture with the size `hw`.
    """

    model: Any
    positive: Any
    negative: Any
    cfg: float = 3.0
    frames: int = 1
    hw: tuple[int, int] = LATENT
    sigmas: tuple[float, ...] = SIGMAS
    part: tuple[int, int, int, int] | None = None
    guider: Callable[[Graph, Any], Any] | None = None
    sampled: Callable[[Graph], Tensor] | None = None

    def having(self, **changes: Any) -> Graph:
        """The same with other parts."""
        return replace(self, **changes)


@dataclass(eq=False)
class Seen:
    """One run. cond, uncond, x: of its first guidance. layers: by attention and prompt, after the first transformer's
    output projection, in the run's first call with that prompt."""

    samples: Tensor
    cond: Tensor | None = None
    uncond: Tensor | None = None
    x: Tensor | None = None
    layers: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    names: dict[Any, str] = field(default_factory=dict)
    """Prompts' names by the host's ids."""


Change = Callable[[Any], Any]
"""From a MODEL to another one."""


class Kit:
    """A small model of a layout, people, and every form of ours on it."""

    def __init__(self, pack: Any, small_models: Any, layout: str) -> None:
        self.pack, self.host, self.layout, self.small_models = pack, pack.host, layout, small_models
        self.lab = fusion_lab.FusionLab(pack, small_models, layout)
        self._kept: dict[Any, Any] = {}

    @cached_property
    def scene(self) -> peer_ours.Scene:
        """A community file and people with embeddings for it."""
        return peer_ours.make_scene(self.pack, self.small_models, self.layout)

    @cached_property
    def graph(self) -> Graph:
        """The host's plain graph."""
        return Graph(self.lab.model, self.lab.positive, self.lab.negative)

    def ours(self, form: str, graph: Graph) -> Graph:
        """The graph with a form of ours in it."""
        if form == PLAIN:
            return graph
        return getattr(self, f"_{form.replace('-', '_')}")(graph)

    def _fused(self, graph: Graph) -> Graph:
        return graph.having(model=self.lab.patch(graph.model, identity=self.person)[0])

    def _community(self, graph: Graph) -> Graph:
        return graph.having(model=self.scene.patched(graph.model))

    def _training_free(self, graph: Graph) -> Graph:
        given = {"identity": self.person, "adapter": "training-free", "reference_size": 64}
        return graph.having(model=self.lab.patch(graph.model, **given)[0])

    def _routed(self, graph: Graph, **settings: Any) -> Graph:
        height, width = (8 * n for n in graph.hw)
        people, masks = [self.lab.identity(3), self.lab.identity(4)], fusion_lab.halves(height, width)
        if graph.part is not None:
            y, x, h, w = (8 * n for n in graph.part)
            masks = [mask[y : y + h, x : x + w] for mask in masks]
        routed = self.lab.routed(people, masks, **settings)
        return graph.having(model=self.lab.patch(graph.model, routed=routed)[0])

    def _separation(self, graph: Graph) -> Graph:
        return self._routed(graph, separation=6.0)

    def _guidance(self, graph: Graph) -> Graph:
        positive, _, model, *_ = self._guidance_lab.run(model=graph.model, routed=self._guidance_lab.two_people())
        return graph.having(model=model, positive=positive)

    @cached_property
    def person(self) -> Any:
        """The one identity of the forms without masks."""
        return self.lab.identity(1)

    @cached_property
    def _guidance_lab(self) -> guidance_lab.Lab:
        return guidance_lab.Lab(self.pack, self.small_models, self.host.base)

    def run(self, graph: Graph) -> Seen:
        """Samples a graph; the same graph gives the same bits."""
        torch.manual_seed(SEED)
        if graph.sampled is not None:
            return Seen(graph.sampled(graph))
        import comfy.samplers

        seen = Seen(torch.empty(0))
        model = _probed(graph.model, seen, self.lab.sites[0].key)
        guider = (graph.guider or cfg_guider)(graph, model)
        noise = fusion_lab.noise(graph.frames, graph.hw, seed=SEED)
        if graph.part is not None:
            y, x, h, w = graph.part
            noise = noise[:, :, y : y + h, x : x + w]
        latent = torch.zeros_like(noise)
        with torch.no_grad():
            samples = guider.sample(
                noise, latent, comfy.samplers.sampler_object("euler"), torch.tensor(graph.sigmas), seed=SEED,
                disable_pbar=True,
            )  # fmt: skip
        seen.samples = graph.model.model.process_latent_in(samples)  # the scale of the predictions
        return seen

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, remembered."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def text(self, seed: int, tokens: int = 77) -> Any:
        """Another prompt, the same object for the same numbers."""
        make = lambda: self.small_models.conditioning(self.layout, seed=100 + seed, tokens=tokens)  # noqa: E731
        return self.kept(("text", seed, tokens), make)

    def node(self, node_id: str, **given: Any) -> tuple[Any, ...]:
        """Runs a node of the host or of another pack, old or new style, with the defaults of what is not given."""
        node = self.host.node(node_id)
        declared = node.INPUT_TYPES()
        inputs = {**declared.get("required", {}), **declared.get("optional", {})}
        values = {name: default for name, spec in inputs.items() if (default := peer_ours._default(spec)) is not None}
        run = node.execute if hasattr(node, "define_schema") else getattr(node(), node.FUNCTION)
        found = run(**{**values, **given})
        return tuple(getattr(found, "args", found))


def cfg_guider(graph: Graph, model: Any) -> Any:
    """The host's CFGGuider."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(graph.positive, graph.negative)
    guider.set_cfg(graph.cfg)
    return guider


def _probed(model: Any, seen: Seen, first: tuple[Any, ...]) -> Any:
    """A clone that notes what `Seen` holds. Prompts are known by the names that the guider gives them."""
    from comfy.patcher_extension import WrappersMP

    probe, names = model.clone(), seen.names

    def outer_sample(executor: Any, *args: Any, **given: Any) -> Any:
        for name, conds in executor.class_obj.conds.items():
            names.update({cond["uuid"]: name for cond in conds or ()})
        return executor(*args, **given)

    def note(attention: str) -> Callable[[Tensor, dict[str, Any]], Tensor]:
        def output(out: Tensor, extra: dict[str, Any]) -> Tensor:
            if (*extra["block"], extra["block_index"]) == tuple(first):
                parts = zip(extra["uuids"], out.chunk(len(extra["uuids"])))
                for uuid, part in parts:
                    seen.layers.setdefault((attention, names.get(uuid, "unnamed")), part.clone())
            return out

        return output

    def guided(args: dict[str, Any]) -> Tensor:
        if seen.x is None:
            seen.x, seen.cond = args["input"].clone(), args["cond_denoised"].clone()
            seen.uncond = None if args["uncond_denoised"] is None else args["uncond_denoised"].clone()
        return args["denoised"]

    probe.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "peer_probe", outer_sample)
    probe.set_model_attn1_output_patch(note("attn1"))
    probe.set_model_attn2_output_patch(note("attn2"))
    post = probe.model_options.get("sampler_post_cfg_function", [])
    probe.model_options["sampler_post_cfg_function"] = [guided, *post]  # first: the predictions before anybody's change
    return probe


class Predictions:
    """x0 of single prompts at the first noise level: what a composition by hand is made of.

    The positive prompt sees the faces of `form`, every other prompt none; each is asked alone. What a form does to
    every prompt, or to negative ones, stays: `separation` holds people apart everywhere, and a community file has
    something to say to negative prompts.
    """

    def __init__(self, kit: Kit, form: str, base: Graph) -> None:
        self._kit, self.form, self.base = kit, form, base

    def positive(self, change: Change | None = None, prompt: Any = None) -> Tensor:
        """With our faces. change: applied to the MODEL after ours. prompt: instead of the graph's."""
        graph = self.base if prompt is None else self.base.having(positive=prompt)
        return self._alone(self.form, graph.having(cfg=1.0), change)

    def plain(self, prompt: Any, change: Change | None = None) -> Tensor:
        """Without our faces."""
        if self.form in SAID_TO_ALL:
            return self._alone(self.form, self.base.having(negative=prompt, cfg=0.0), change)
        return self._alone(PLAIN, self.base.having(positive=prompt, cfg=1.0), change)

    def part(self, part: tuple[int, int, int, int]) -> Predictions:
        """Of a part of the latent (y, x, height, width), with the faces that belong there."""
        return Predictions(self._kit, self.form, self.base.having(part=part))

    def on(self, model: Any) -> Predictions:
        """Of another MODEL, which the kit keeps."""
        return Predictions(self._kit, self.form, self.base.having(model=model))

    def layers(self, prompt: Any) -> dict[tuple[str, str], Tensor]:
        """What the first transformer gives with a prompt in the positive's place."""
        graph = self.base.having(positive=prompt)
        key = ("layers", self.form, id(prompt), graph.hw)
        return self._kit.kept(key, lambda: (self._kit.run(self._kit.ours(self.form, graph)).layers, prompt))[0]

    def _alone(self, form: str, graph: Graph, change: Change | None) -> Tensor:
        """The prediction of the positive prompt at guidance 1, of the negative one at guidance 0."""

        def make() -> Tensor:
            mine = self._kit.ours(form, graph)
            model = mine.model if change is None else change(mine.model)
            return self._kit.run(mine.having(model=model, guider=None, sigmas=(graph.sigmas[0], 0.0))).samples

        if change is not None:
            return make()
        asked = graph.positive if graph.cfg else graph.negative
        # The prompt is kept beside the result: its id stays its own.
        key = (
            "alone",
            form,
            id(graph.model),
            id(asked),
            graph.cfg,
            graph.hw,
            graph.part,
            graph.frames,
            graph.sigmas[0],
        )
        return self._kit.kept(key, lambda: (make(), asked))[0]

    @cached_property
    def x(self) -> Tensor:
        """The noisy latent that all of them see."""
        seen = self._kit.run(self.base.having(guider=None))
        assert seen.x is not None
        return seen.x

    def guided(self) -> Tensor:
        """Classifier-free guidance of the two prompts."""
        cond, uncond = self.positive(), self.plain(self.base.negative)
        return uncond + self.base.cfg * (cond - uncond)

    def through(self, model: Any) -> Tensor:
        """The guidance that another pack's functions in a MODEL make of the two predictions."""
        import comfy.model_patcher
        import comfy.samplers

        cond, uncond = self.positive(), self.plain(self.base.negative)
        options = comfy.model_patcher.create_model_options_clone(model.model_options)
        options["sampler_calc_cond_batch_function"] = lambda _: [cond.clone(), uncond.clone()]
        sigma = torch.tensor([self.base.sigmas[0]] * self.base.frames)
        return comfy.samplers.sampling_function(
            model.model, self.x.clone(), sigma, [], [], self.base.cfg, model_options=options
        )


Install = Callable[[Kit, Graph], Graph]


@dataclass(frozen=True, eq=False)
class Row:
    """One feature of the host or of a pack, and what is right beside it.

    check: "adds" (contributions of the first cross-attention add up; self-attention is not theirs), "value" (`value` is
    the composition by hand), "layers" (`layers` is the first transformer by hand), "same" (changes nothing by
    mathematics), "orders" (both orders agree, and ours is whole where `first` says that the first layers are not
    theirs: attn1, attn2). why: the right value in words, where it takes some. model: whether it patches a MODEL (else
    only its own order makes sense). prompts: changes of the graph without either of us, such as longer texts. refused:
    (form, order) that must end in an error with these words. formula: whether the layers of an "orders" row are also
    held against METHOD 1.1 by hand; not where weights change. twice: whether theirs may be installed twice; one wraps
    whatever the UNet of the last run holds, so that it adds up by itself. thorough: whether every form is tried even
    in a short run.
    """

    name: str
    install: Install
    check: str
    pack: str = ""
    value: Callable[[Kit, Predictions], Tensor] | None = None
    layers: Callable[[Kit, Predictions], dict[tuple[str, str], Tensor]] | None = None
    prompts: Install | None = None
    refused: Mapping[tuple[str, str], str] = field(default_factory=dict)
    layout: str = "sd15_tiny"
    forms: Sequence[str] = FORMS
    model: bool = True
    nodes: Sequence[str] = ()
    first: Sequence[str] = ()
    base: Mapping[str, Any] = field(default_factory=dict)
    negative_is_theirs: bool = True
    why: str = ""
    tolerance: float = 1e-3
    formula: bool = True
    twice: bool = True
    thorough: bool = False

    @property
    def id(self) -> str:
        """As tests and the table call it."""
        return f"{self.pack or 'ComfyUI'}: {self.name}"


@dataclass(frozen=True)
class Cell:
    """A line of the table. theirs, ours: size of a contribution beside the other's, over what it is alone. error: of
    the right value, over the smaller of the two contributions."""

    row: str
    form: str
    order: str
    check: str
    theirs: float
    ours: float
    error: float
    verdict: str


def size(change: Tensor) -> float:
    """Euclidean norm."""
    return float(change.float().norm())
