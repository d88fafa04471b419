"""How Ray's workers share cases, with a Ray that is played."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nnunet_nmsw.errors import UserError
from nnunet_nmsw.inference.ray_cases import AT_A_TIME, next_case
from nnunet_nmsw.inference.ray_engine import Job, RayPredictor, Worker, Workers, run

exceptions = pytest.importorskip("ray.exceptions")


class Reference:
    """What will be there, or never."""

    def __init__(self, actor: Actor, result: Callable[[], Any], comes: bool = True) -> None:
        self.actor, self.result, self.comes = actor, result, comes


class Actor:
    """A worker that dies of some cases, and then with all that it has."""

    def __init__(self, ray: Ray, starts: bool) -> None:
        self.ray, self.dead = ray, None
        self.__ray_ready__ = self.called(lambda: Reference(self, lambda: None, comes=starts))
        self.predict = self.called(lambda job, attempt: Reference(self, lambda: self.predicted(job)))

    def called(self, function: Callable[..., Reference]) -> Any:
        return SimpleNamespace(remote=function)

    def predicted(self, job: Job) -> str | None:
        name = Path(job.output).name
        if self.dead is None and name in self.ray.deadly:
            self.dead = self.ray.deadly[name]
        if self.dead is not None:
            raise self.dead
        self.ray.done.append(name)
        return None


class Ray:
    """Workers that start, but for some, and cases that are deadly."""

    def __init__(self, deadly: dict[str, Exception], starts: Callable[[int], bool] = lambda number: True) -> None:
        self.deadly, self.starts, self.done, self.made = deadly, starts, [], 0
        self.exceptions = exceptions

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.make))

    def make(self, *_: Any) -> Actor:
        self.made += 1
        return Actor(self, self.starts(self.made))

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def wait(self, references: list[Reference], num_returns: int) -> tuple[list[Reference], list[Reference]]:
        there = [reference for reference in references if reference.comes]
        assert there, "this would wait for ever"
        return there[:num_returns], there[num_returns:]

    def get(self, reference: Reference) -> Any:
        return reference.result()


def predicted(ray: Ray, cases: int) -> list[str]:
    jobs = [Job([f"case_{n}_0000.nii.gz"], None, f"out/case_{n}", None) for n in range(cases)]
    return run(ray, jobs, Workers(lambda: None, cores=1), False, False)


@pytest.mark.parametrize("death", [exceptions.RayActorError(), exceptions.OutOfMemoryError("too little memory")])
def test_a_case_that_kills_its_worker_takes_no_other_with_it(death):
    ray = Ray({"case_3": death})
    (failed,) = predicted(ray, 6)
    assert failed.startswith("case_3: the worker died 3 times")
    assert sorted(ray.done) == [f"case_{n}" for n in (0, 1, 2, 4, 5)]


def test_workers_that_have_no_place_get_no_cases():
    ray = Ray({}, starts=lambda number: number == 2)
    assert predicted(ray, 5) == []
    assert len(ray.done) == 5


def test_a_worker_that_is_lost_may_have_no_successor():
    ray = Ray({"case_0": exceptions.RayActorError()}, starts=lambda number: number <= 2)
    (failed,) = predicted(Ray({"case_0": exceptions.RayActorError()}, starts=lambda number: number <= 4), 5)
    assert failed.startswith("case_0")
    with pytest.raises(AssertionError, match="wait for ever"):  # all are gone, and the cluster has no place: it waits
        predicted(ray, 1)


def test_a_case_whose_worker_has_died_has_the_next_one_alone():
    attempts = Counter({1: 1})
    assert next_case([0, 1], attempts, ["a"], []) == (0, "a")
    assert next_case([1], attempts, ["a", "b"], [(0, "a")]) == (1, "b")
    assert next_case([1], attempts, ["a"], [(0, "a")]) is None
    assert next_case([2], attempts, ["a"], [(1, "a")]) is None
    assert next_case([2, 3], attempts, ["a", "b"], [(0, "a")] * AT_A_TIME) == (2, "b")


def test_a_job_has_the_files_of_its_case(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ob.nii.gz").touch()
    predictor = RayPredictor(Workers(lambda: None), device=torch.device("cpu"))
    predictor.dataset_json = {"file_ending": ".nii.gz"}
    jobs = predictor.cases_from_files([["a0", "a1"], ["b0", "b1"]], ["pa", "pb"], ["oa", "ob"], 1)
    written = (tmp_path / "ob.nii.gz").stat().st_mtime_ns
    assert jobs == [
        Job([f"{tmp_path}/a0", f"{tmp_path}/a1"], f"{tmp_path}/pa", f"{tmp_path}/oa", None),
        Job([f"{tmp_path}/b0", f"{tmp_path}/b1"], f"{tmp_path}/pb", f"{tmp_path}/ob", written),
    ]
    assert [job.previous_stage for job in predictor.cases_from_files([["a"]], None, ["oa"], 1)] == [None]


def test_a_worker_without_a_model_says_why_for_each_case():
    def fails():
        raise UserError("the model folder is not on this machine")

    worker = Worker(fails, [["a"]], None, False)
    assert worker.predict(Job(["a"], None, "o", None), 0) == "the model folder is not on this machine"
