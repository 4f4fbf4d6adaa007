"""What goes wrong in the middle of something: the next generation is that of a fresh process, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fusion_lab
import jobs
import peer_ours
import pytest
import torch
from fusion_lab import FusionLab, relative
from jobs import FREE, ONE, PAIR, Job

PLAIN_JOB = Job(steps=3)
FACE_JOB = Job(ONE, people=(3,), steps=3)
PAIR_JOB = Job(PAIR, people=(3, 4), steps=3)
MATCHED_JOB = Job(ONE, people=(5,), steps=3, timestep="matched")


@pytest.fixture(scope="module")
def lab(pack: Any, small_models: Any) -> FusionLab:
    return FusionLab(pack, small_models, jobs.LAYOUT)


@pytest.fixture(scope="module")
def fresh(lab: FusionLab, tmp_path_factory: pytest.TempPathFactory) -> dict[Job, torch.Tensor]:
    """Results of a process in which nothing went wrong before; the plain job is the first thing it ever samples."""
    order = [PLAIN_JOB, FACE_JOB, PAIR_JOB, MATCHED_JOB]
    return dict(zip(order, jobs.in_fresh_process(lab.pack.host, order, tmp_path_factory.mktemp("fresh"))))


@pytest.fixture
def afterwards(lab: FusionLab, fresh: dict[Job, torch.Tensor]) -> Iterator[None]:
    """After the fault: plain and with a face as in a fresh process, on the very model the fault happened with."""
    yield
    for job in (PLAIN_JOB, FACE_JOB):
        assert torch.equal(jobs.sampled(lab, job), fresh[job]), f"{job.kind} differs after the fault"


pytestmark = pytest.mark.usefixtures("afterwards")


class StumbleError(Exception):
    """What another node or pack raises."""


def at_call(lab: FusionLab, number: int, act: Callable[[], None]) -> Any:
    """Acts when the UNet is called for the n-th time (from 0); returns the handle to remove."""
    calls = iter(range(1_000_000))

    def hook(*_: Any) -> None:
        if next(calls) == number:
            act()

    return lab.unet.register_forward_pre_hook(hook)


def empty_cache(lab: FusionLab) -> None:
    lab.pack.submodule("nodes.reference_cache").CACHE.drop(lambda _: True)


# Interrupt and exceptions


@pytest.mark.parametrize(
    "job", [FACE_JOB, PAIR_JOB, MATCHED_JOB, Job(FREE, people=(3,), steps=3)], ids=lambda j: j.kind
)
@pytest.mark.parametrize("call", range(4))
def test_interrupted_at_any_step(lab: FusionLab, job: Job, call: int) -> None:
    """The Cancel button: in the reference pass (the first calls) or at any later step."""
    import comfy.model_management as management

    empty_cache(lab)
    handle = at_call(lab, call, lambda: management.interrupt_current_processing(True))
    try:
        with pytest.raises(management.InterruptProcessingException):
            jobs.sampled(lab, job)
            management.throw_exception_if_processing_interrupted()  # cancelled in the last step: the next node stops
    finally:
        handle.remove()


@pytest.mark.parametrize("call", [0, 2])
def test_another_patch_fails_at_any_step(lab: FusionLab, call: int) -> None:
    def stumble() -> None:
        raise StumbleError

    empty_cache(lab)
    handle = at_call(lab, call, stumble)
    try:
        with pytest.raises(StumbleError):
            jobs.sampled(lab, FACE_JOB)
    finally:
        handle.remove()


def test_a_later_node_fails(lab: FusionLab) -> None:
    with pytest.raises(StumbleError):
        results = jobs.sampled(lab, PAIR_JOB), jobs.patched(lab, MATCHED_JOB)
        raise StumbleError(results)


# Memory


class Kernel:
    """The host's attention on a device that holds only so many queries at once."""

    def __init__(self, most: int) -> None:
        self.most, self.refused = most, 0

    def __call__(self, function: Any, q: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        if q.shape[1] > self.most:
            self.refused += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return function(q, *rest, **named)


def with_kernel(model: Any, kernel: Kernel) -> Any:
    """The MODEL with another pack's attention override in its cross-attention."""
    clone = model.clone()
    options = clone.model_options["transformer_options"]

    def override(function: Any, q: Any, k: Any, *rest: Any, **named: Any) -> Any:
        cross = k.shape[1] != q.shape[1]  # our layers only: the host's own self-attention has no such fallback
        return kernel(function, q, k, *rest, **named) if cross else function(q, k, *rest, **named)

    options["optimized_attention_override"] = override
    return clone


@pytest.mark.parametrize(("job", "most"), [(FACE_JOB, 40), (PAIR_JOB, 9), (MATCHED_JOB, 2)], ids=["40", "9", "2"])
def test_a_layer_out_of_memory_goes_on_in_parts(
    lab: FusionLab, fresh: dict[Job, torch.Tensor], job: Job, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(most)
    # The reference pass runs the host's own layers, which have no fallback: it is made beforehand, or small enough.
    model = jobs.patched(lab, job)
    if job.timestep == "clean":
        lab.sample(model, steps=1)
        ours = lab.sample(with_kernel(model, kernel), steps=job.steps)
    else:
        monkeypatch.setattr(lab.pack.submodule("nodes.host.clean_room"), "OVERRIDE", "nobody's")
        ours = lab.sample(with_kernel(model, kernel), steps=job.steps)
    assert kernel.refused > 0
    assert relative(ours, fresh[job]) < 1e-5


def test_no_memory_at_all_says_what_to_change(lab: FusionLab) -> None:
    import comfy.model_management as management

    model = jobs.patched(lab, FACE_JOB)
    lab.sample(model, steps=1)
    with pytest.raises(management.OOM_EXCEPTION, match=r"64 queries over \d+ text and face keys.*lower reference_size"):
        lab.sample(with_kernel(model, Kernel(0)), steps=1)


def test_the_models_are_unloaded_between_two_runs(lab: FusionLab, fresh: dict[Job, torch.Tensor]) -> None:
    import comfy.model_management as management

    model = jobs.patched(lab, FACE_JOB)
    for _ in range(2):
        management.unload_all_models()
        management.soft_empty_cache()
        assert torch.equal(lab.sample(model, steps=3), fresh[FACE_JOB])


def test_the_vae_is_swapped(lab: FusionLab, fresh: dict[Job, torch.Tensor]) -> None:
    class Mirrored:
        """A VAE of the same kind with other weights."""

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return lab.vae.encode(pixels.flip(2))

    one, _ = lab.patch(identity=lab.identity(3))
    other, _ = lab.patch(identity=lab.identity(3), vae=Mirrored())
    for _ in range(2):
        assert torch.equal(lab.sample(one), fresh[FACE_JOB])
        assert relative(lab.sample(other), fresh[FACE_JOB]) > 1e-4


def test_two_queues_with_different_adapters_on_one_model(lab: FusionLab, small_models: Any) -> None:
    """They take turns step by step in the queue; each gives what it gives alone."""
    second = small_models.adapter(jobs.LAYOUT, seed=5).name
    models = [lab.patch(identity=lab.identity(3), adapter=name)[0] for name in (lab.adapter.name, second)]
    alone = []
    for model in models:
        empty_cache(lab)
        alone.append(lab.sample(model))
    assert relative(*alone) > 1e-3
    for _ in range(3):
        assert [torch.equal(lab.sample(model), wanted) for model, wanted in zip(models, alone)] == [True, True]


# Files and folders


def save_person(lab: FusionLab, seed: int, name: str, if_exists: str = "overwrite") -> Any:
    node = lab.pack.nodes["FusedIDSaveIdentity"]
    return peer_ours.run_node(node, identity=lab.identity(seed), name=name, if_exists=if_exists)


def identities(lab: FusionLab) -> Path:
    folder: Path = lab.pack.host.base / "models" / "identities"
    folder.mkdir(exist_ok=True)
    return folder


def test_a_full_disk_while_saving_keeps_the_old_identity(lab: FusionLab, monkeypatch: pytest.MonkeyPatch) -> None:
    save_person(lab, 1, "full")
    before = (identities(lab) / "full.safetensors").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"FusedIDSaveIdentity: .*No space left on device"):
        save_person(lab, 2, "full")
    assert (identities(lab) / "full.safetensors").read_bytes() == before
    assert list(identities(lab).glob(".*")) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_read_only_folder_is_an_error_that_names_it(lab: FusionLab, tmp_path: Path) -> None:
    folder = tmp_path / "read_only"
    folder.mkdir()
    keep, person = lab.pack.submodule("nodes.identity_files").keep, lab.identity(1)
    folder.chmod(0o555)
    for place in (folder, *list(folder.parents)[:3]):
        place.chmod(place.stat().st_mode | 0o555)
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:  # root may write everywhere
                os.setuid(65534)
            keep(person, folder, "person", overwrite=False)
        except PermissionError as error:
            os._exit(0 if "read_only" in str(error) else 3)
        except BaseException:
            os._exit(4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(folder.iterdir()) == []


def test_the_clock_jumps_and_files_get_older(
    lab: FusionLab, small_models: Any, fresh: dict[Job, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restored backup is older than the file it replaces: it is read all the same."""
    node, second = lab.pack.nodes["FusedIDAttentionPatch"], small_models.adapter(jobs.LAYOUT, seed=5)
    place = lab.adapter.with_name("clock.safetensors")
    place.write_bytes(second.read_bytes())
    monkeypatch.setattr(time, "time", lambda: 1.0)
    before = node.fingerprint_inputs(adapter=place.name)
    other = lab.sample(lab.patch(identity=lab.identity(3), adapter=place.name)[0])
    place.write_bytes(lab.adapter.read_bytes())
    os.utime(place, (10**9, 10**9))
    assert node.fingerprint_inputs(adapter=place.name) != before
    assert torch.equal(lab.sample(lab.patch(identity=lab.identity(3), adapter=place.name)[0]), fresh[FACE_JOB])
    assert relative(other, fresh[FACE_JOB]) > 1e-3
    place.unlink()


WRITER = """
    import sys
    from pathlib import Path
    sys.path[:0] = {paths!r}
    import jobs
    lab = jobs.open_lab(Path({checkout!r}), Path({base!r}))
    keep = lab.pack.submodule("nodes.identity_files").keep
    for number in range({count}):
        keep(lab.identity({seed} + number), Path({folder!r}), "shared", overwrite=False)
    print("done", flush=True)
"""


def test_two_comfyui_processes_share_the_folders(lab: FusionLab, fresh: dict[Job, torch.Tensor]) -> None:
    """Both save new people under one name while this process samples and reads: nobody is lost, none is torn."""
    host, folder, count = lab.pack.host, identities(lab), 15
    load = lab.pack.submodule("faces.identity_file").load_identity
    paths = [str(Path(__file__).parent)]
    scripts = [
        textwrap.dedent(WRITER).format(
            paths=paths, checkout=str(host.path), base=str(host.base), count=count, seed=seed, folder=str(folder)
        )
        for seed in (100, 200)
    ]
    logs = [folder.with_name(f"writer_{number}.log") for number in (1, 2)]
    writers = [
        subprocess.Popen([sys.executable, "-c", script], cwd=jobs.ROOT, stdout=log.open("wb"), stderr=subprocess.STDOUT)
        for script, log in zip(scripts, logs)
    ]
    while any(writer.poll() is None for writer in writers):
        assert torch.equal(jobs.sampled(lab, FACE_JOB), fresh[FACE_JOB])
        for path in folder.glob("shared*.safetensors"):
            assert len(load(path).references) == 1
        time.sleep(0.05)
    assert [writer.returncode for writer in writers] == [0, 0], logs[0].read_text()[-2000:]
    saved = {load(path).references[0].crop.tobytes() for path in folder.glob("shared*.safetensors")}
    wanted = {lab.identity(seed + n).references[0].crop.tobytes() for seed in (100, 200) for n in range(count)}
    assert saved == wanted
    assert list(folder.glob(".*")) == []


def test_an_adapter_disappears_between_two_runs(lab: FusionLab, fresh: dict[Job, torch.Tensor]) -> None:
    place = lab.adapter.with_name("gone.safetensors")
    place.write_bytes(lab.adapter.read_bytes())
    model, _ = lab.patch(identity=lab.identity(3), adapter=place.name)
    place.unlink()
    with pytest.raises(ValueError, match=r"adapter 'gone\.safetensors' is not in models/fusedid"):
        lab.patch(identity=lab.identity(3), adapter=place.name)
    assert torch.equal(lab.sample(model), fresh[FACE_JOB]), "what is loaded does not need its file any more"


def test_masks_of_another_shape_in_the_middle_of_a_session(lab: FusionLab) -> None:
    wrong = [fusion_lab.halves()[0], fusion_lab.halves(64, 128)[1]]
    with pytest.raises(ValueError, match="cannot show the same picture"):
        lab.routed([lab.identity(3), lab.identity(4)], wrong)
