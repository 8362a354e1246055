"""Arm co-train: human gaze in the same optimisation step, exact by value, in order, on any number of ranks."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from attention.losses import attention_loss
from attention.maps import fixation_density, warp
from engine.errors import InputError, Requeue
from engine.passes import Backward
from engine.program import parse_config
from engine.runs import RunFolder
from pretrain.config import Config
from pretrain.contrast import nt_xent
from pretrain.cotrain import MAP_SIZE, CoTrainBatch, CoTraining, GazeShards, gaze_seed, open_gaze, with_gaze
from pretrain.data import Batch, ViewDataset
from pretrain.model import Student, input_statistics
from pretrain.objective import MAIN_GRADIENT, Objective, attention_objective
from pretrain.replay_config import ReplayConfig
from pretrain.replayed import replay
from pretrain.trainer import _batches, make_plan, open_data, train
from shards.order import SampleOrder
from tests.conftest import TinySample
from tests.pretrain.test_resume import same_end

BATCH, GAZE = 12, 6


@pytest.fixture
def read_config(student_config: Callable[..., Path], tiny_sample: TinySample) -> Callable[..., Config]:
    """A co-training config; keyword arguments as for `student_config`."""

    def read(**overrides: Any) -> Config:
        given = {"arm": "co-train", "data__gaze": str(tiny_sample.gaze), "data__gaze_batch_size": GAZE} | overrides
        return parse_config(Config, argv=["--config", str(student_config(**given))])[0]

    return read


class Place:
    """A rank's place, for what only wants to know it."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


def gaze_batches(config: Config, *, rank: int = 0, world_size: int = 1, start: int = 0, stop: int = 5) -> list[Any]:
    images = open_data(config)
    plan = make_plan(config, num_samples=images.num_samples, world_size=world_size)
    plan = dataclasses.replace(plan, total_steps=stop)
    ranks: Any = Place(rank, world_size)
    return list(
        with_gaze(
            _batches(config, images, ranks=ranks, start=start, plan=plan),
            open_gaze(config, world_size=world_size),
            config,
            ranks=ranks,
            start_step=start,
            stop_step=stop,
        )
    )


def test_gaze_comes_in_one_order_on_any_number_of_ranks_and_after_any_stop(read_config: Callable[..., Config]) -> None:
    """20 gaze images, 6 a step: steps 0 to 4 pass the end of the set, and each epoch holds each image once."""
    config = read_config()
    whole = gaze_batches(config)
    for world_size in (2, 3):
        parts = [gaze_batches(config, rank=rank, world_size=world_size, start=2) for rank in range(world_size)]
        for step, batch in enumerate(whole[2:]):
            for name in ("images", "boxes", "flips", "colours"):
                ours = torch.cat([getattr(part[step].gaze, name) for part in parts], dim=1)
                assert torch.equal(ours, getattr(batch.gaze, name))
            assert torch.equal(torch.cat([part[step].gaze.maps for part in parts]), batch.gaze.maps)
    seen = torch.cat([batch.gaze.maps for batch in whole])[:20].flatten(1)
    assert len({row.numpy().tobytes() for row in seen}) == 20
    assert not torch.equal(whole[0].gaze.boxes, whole[0].images.boxes[:1, :GAZE])


def test_a_sample_comes_with_its_human_map(tiny_sample: TinySample) -> None:
    shards = GazeShards(tiny_sample.gaze)
    sample = shards.read(0, 3)
    info = sample.info()
    points = np.concatenate([np.reshape(one, (-1, 2)) for one in info["fixations"]])
    sigma = shards.manifest.extra["gaze"]["sigma"]
    human = fixation_density(points, size=(info["height"], info["width"]), sigma=sigma, grid=(MAP_SIZE, MAP_SIZE))
    assert sample.map is not None and abs(sample.map.sum() - 1) < 1e-5
    # stored in 8 bits, as a teacher's maps are
    np.testing.assert_allclose(sample.map, human, atol=0.01 * human.max())


def test_an_image_that_nobody_looked_at_is_left_out(
    tiny_sample: TinySample, read_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(model__backbone="test_vit", model__head_norm="none", attention__min_mass=0.0)
    step, module, batch = prepared(config)
    assert batch.gaze.maps is not None
    batch.gaze.maps[:3] = 1
    scalars = step(batch, step=0, backward=Backward(Accelerator(), module))
    assert scalars["attention_views"].item() == pytest.approx(0.5)
    monkeypatch.setattr(GazeShards, "read_info", lambda *_: {"height": 64, "width": 64, "fixations": []})
    sample = GazeShards(tiny_sample.gaze).read(0, 0)
    assert sample.map is not None and sample.map.min() == sample.map.max()


def prepared(config: Config) -> tuple[CoTraining, Student, CoTrainBatch]:
    torch.manual_seed(0)
    student = Student(config, num_classes=4).train()
    objective = Objective(student, config, input_statistics(student.backbone), torch.device("cpu"))
    return CoTraining(objective), student, gaze_batches(config, stop=1)[0]


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_the_gradient_is_that_of_the_sum(read_config: Callable[..., Config], micro_batch: int) -> None:
    """NT-Xent of the images plus lambda (A KLD - B NSS) of the gaze images, written out in one graph."""
    overrides = {"model__backbone": "test_vit", "model__head_norm": "none", "optim__micro_batch": micro_batch}
    config = read_config(attention__weight=3.0, attention__min_mass=0.0, **overrides)
    step, student, batch = prepared(config)
    rows: list[int] = []
    student.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    scalars = step(batch, step=0, backward=Backward(Accelerator(), student))
    # two views of 12 images, in parts once without a graph and once with one, and then one view of 6 gaze images
    assert rows == ([8] * 6 + [4, 2] if micro_batch else [24, 6])
    ours = {name: weight.grad.clone() for name, weight in student.named_parameters() if weight.grad is not None}
    student.zero_grad()
    first, second = student(step.objective.prepare(batch.images)).embeddings.chunk(2)
    contrast = nt_xent(first, second, temperature=config.temperature)
    gaze = batch.gaze
    logits = student(step.objective.prepare(gaze)).attention[0]
    target = warp(gaze.densities(), gaze.boxes[0], gaze.flips[0], (logits.shape[1], logits.shape[2]))
    attention = attention_loss(logits, target, kld_weight=1.0, nss_weight=0.1)
    assert scalars["attention_views"].item() == 1.0
    torch.testing.assert_close(scalars["attention"], attention.detach())
    (contrast + 3.0 * attention).backward()
    torch.testing.assert_close(scalars["loss"].detach(), (contrast + 3.0 * attention).detach())
    for name, weight in student.named_parameters():
        assert weight.grad is not None
        torch.testing.assert_close(ours[name], weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_the_gradient_ratio_is_that_of_the_two_passes_on_the_trunk(
    read_config: Callable[..., Config], micro_batch: int
) -> None:
    """|lambda dL_attn| of the gaze images over |dL_nt_xent| of the images, each from a backward of its own."""
    overrides = {"model__backbone": "test_vit", "model__head_norm": "none", "optim__micro_batch": micro_batch}
    config = read_config(attention__weight=3.0, attention__min_mass=0.0, diagnostics_every=2, **overrides)
    step, student, batch = prepared(config)
    assert "gradient_ratio" not in step(batch, step=0, backward=Backward(Accelerator(), student))
    student.zero_grad()
    scalars = step(batch, step=1, backward=Backward(Accelerator(), student))
    assert MAIN_GRADIENT not in scalars
    after = {name: weight.grad.clone() for name, weight in student.named_parameters() if weight.grad is not None}
    trunk = list(student.backbone.parameters())
    first, second = student(step.objective.prepare(batch.images)).embeddings.chunk(2)
    contrast = nt_xent(first, second, temperature=config.temperature)
    logits = student(step.objective.prepare(batch.gaze)).attention
    attention = attention_objective(logits, batch.gaze, config.attention)[0]
    found = [torch.autograd.grad(loss, trunk, allow_unused=True) for loss in (3.0 * attention, contrast)]
    norms = [torch.nn.utils.get_total_norm([g for g in each if g is not None]) for each in found]
    # in parts, the first 4 of the 12 images stand for all
    assert scalars["gradient_ratio"].item() == pytest.approx(
        (norms[0] / norms[1]).item(), rel=0.5 if micro_batch else 1e-3
    )
    student.zero_grad()
    step(batch, step=0, backward=Backward(Accelerator(), student))
    for name, weight in student.named_parameters():
        assert weight.grad is None or torch.equal(after[name], weight.grad), "looking changes no bit"


def test_running_statistics_are_those_of_the_images(read_config: Callable[..., Config]) -> None:
    step, student, batch = prepared(read_config())
    reference = prepared(read_config())[1]
    with torch.no_grad():
        reference(step.objective.prepare(batch.images))
    step(batch, step=0, backward=Backward(Accelerator(), student))
    ours, theirs = dict(student.named_buffers()), dict(reference.named_buffers())
    for name in ours:
        if name.endswith(("running_mean", "running_var")):
            assert torch.equal(ours[name], theirs[name]), name


def test_a_run_learns_both_and_resumes_bit_equal(read_config: Callable[..., Config], tmp_path: Path) -> None:
    # nearly whole images in their own colours: few and tiny, they would else hide in 40 steps what is learnt
    easy = {"views__min_area": 0.9, "views__jitter": 0.0, "views__blur": 0.0, "views__grey": 0.0}
    config = read_config(max_steps=40, attention__stages=[-2, -1], attention__weight=3.0, optim__lr=0.003, **easy)
    train(dataclasses.replace(config, run="whole"))
    with pytest.raises(Requeue):
        train(dataclasses.replace(config, run="parts", loop=dataclasses.replace(config.loop, stop_after=7)))
    train(dataclasses.replace(config, run="parts", loop=dataclasses.replace(config.loop, num_workers=2)))
    same_end(tmp_path / "runs" / "whole", tmp_path / "runs" / "parts")
    lines = [json.loads(line) for line in (tmp_path / "runs" / "whole" / "metrics.jsonl").open()]
    for name in ("train/attention", "train/nt_xent"):
        assert np.mean([line[name] for line in lines[-16:]]) < np.mean([line[name] for line in lines[:8]])
    assert load_file(tmp_path / "runs" / "whole" / "encoder" / "heads.safetensors")


def test_a_fault_in_the_gaze_pass_is_noted_and_replayed(
    read_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A gaze image of step 2 gives NaN wherever it is read: replay finds it, by the noted line or by the order."""
    without_norms = {"model__backbone": "test_vit", "model__head_norm": "none"}
    config = read_config(max_steps=3, loop__max_skipped=1, loop__checkpoint_every=1, **without_norms)
    gaze = open_gaze(config, world_size=1)
    epoch, shard, row = SampleOrder(gaze.shard_sizes, seed=gaze_seed(config)).slice(GAZE, 2 * GAZE)[4].tolist()
    read, prepare = ViewDataset.__getitems__, Objective.prepare

    def marked(self: ViewDataset, positions: list[Any]) -> Batch:
        batch = read(self, positions)
        if self.num_views == 1 and (epoch, shard, row) in positions:
            batch.labels[positions.index((epoch, shard, row))] = -7
        return batch

    def spoiled(self: Objective, batch: Batch) -> torch.Tensor:
        views = prepare(self, batch).unflatten(0, (len(batch.images), -1))
        return views.masked_fill((batch.labels == -7)[:, None, None, None], torch.nan).flatten(0, 1)

    monkeypatch.setattr(ViewDataset, "__getitems__", marked)
    monkeypatch.setattr(Objective, "prepare", spoiled)
    with pytest.raises(FloatingPointError, match=r"pretrain/replay\.py"):
        train(config)
    run = RunFolder(tmp_path / "runs" / "student")
    noted = run.bad_batches_file.read_text()
    line = json.loads(noted)
    key = gaze.key(shard, row)
    assert line["step"] == 2 and line["gaze_positions"][4] == [epoch, shard, row] and line["gaze_keys"][4] == key
    assert [len(line[name]) for name in ("positions", "keys", "gaze_positions", "gaze_keys")] == [12, 12, 6, 6]

    def replayed() -> str:
        capsys.readouterr()
        replay(ReplayConfig(run.path, step=2, micro_batch=0))
        return str(capsys.readouterr().out)

    run.bad_batches_file.unlink()
    for text in ("", noted):
        run.bad_batches_file.write_text(text)
        output = replayed()
        assert "12 samples and 6 gaze samples, weights of step 1" in output
        assert output.count("not finite: ") == 1 and f"not finite: gaze sample {key} (shard {shard}" in output
        assert "attention: nan  <- not finite" in output and "nt_xent: nan" not in output
        assert ("not in" in output) == (not text)
    for name in ("gaze_positions", "gaze_keys"):
        del line[name][4]
    run.bad_batches_file.write_text(json.dumps(line))
    assert "not finite" not in replayed()  # the line is what it reads
    line["keys"][3] = "elsewhere"
    run.bad_batches_file.write_text(json.dumps(line))
    with pytest.raises(InputError, match=r"step 2 had sample 'elsewhere' at row .*train now has .*put back"):
        replayed()


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"),
    [
        ({"data__gaze": None}, 1, ["data.gaze", "co-train"]),
        ({}, 4, ["data.gaze_batch_size 6", "4 ranks"]),
        ({"data__gaze_batch_size": 24}, 1, ["data.gaze_batch_size 24", "20 samples"]),
    ],
)
def test_gaze_that_cannot_be_used_is_refused(
    read_config: Callable[..., Config], overrides: dict[str, Any], world_size: int, words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        open_gaze(read_config(**overrides), world_size=world_size)
    assert all(word in str(caught.value) for word in words)


def test_shards_without_gaze_are_refused(read_config: Callable[..., Config], tiny_sample: TinySample) -> None:
    with pytest.raises(InputError, match="hold no gaze"):
        open_gaze(read_config(data__gaze=str(tiny_sample.val)), world_size=1)
