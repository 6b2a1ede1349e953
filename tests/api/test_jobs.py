"""Jobs that are asked for later, and requests that are made one by a key, on a fake pipeline."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from stepweave.errors import StepweaveError
from stepweave.resource import Resource
from stepweave.serving.request import ActiveRequest
from stepweave.serving.server import Server
from stepweave.store import DirectoryFileStore, SqliteJobStore
from tests.support.asgi import App, Exchange, serving, started
from tests.support.fake_pipeline import FakePipeline
from tests.support.tiny import FAMILIES
from tests.support.waiting import SECONDS

pytestmark = pytest.mark.anyio

LATER = {"Prefer": "respond-async"}
KEY = {"Idempotency-Key": "k"}
PNG = b"\x89PNG"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def later(app: App, headers: dict[str, str] | None = None, **fields: Any) -> str:
    """The id of a new job that is asked for later."""
    answer = await app.post(headers=LATER | (headers or {}), **fields).done()
    assert answer.status == 202, answer.content
    return str(answer.json()["id"])


async def settled(app: App) -> None:
    """Wait until the results of all jobs are kept, and what waits for that has been told."""
    assert app.server.jobs is not None
    await app.until(lambda: not app.server.active and not app.server.jobs.keeping())  # type: ignore[union-attr]
    await asyncio.sleep(0)  # what is called back once a task is done has been by then


async def joined(app: App, count: int) -> None:
    """Wait until so many hold the only job there is."""
    await app.until(lambda: [ticket._holders for ticket in app.server.active.values()] == [count])


def files_of(app: App) -> int:
    assert app.server.jobs is not None
    return app.server.jobs.files.count


# --- a job's life ---


async def test_a_job_is_accepted_runs_and_has_its_result() -> None:
    async with serving() as app:
        app.record.gated = True
        answer = await app.post(
            headers={"Prefer": "wait=5, Respond-Async; x=1"}, num_inference_steps=5
        ).done()
        assert answer.status == 202
        job = answer.json()
        assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
        assert answer.headers["preference-applied"] == "respond-async"
        assert {"state", "position", "eta_seconds"} <= set(job)
        assert (job["object"], job["kind"], job["result"], job["error"]) == (
            "job",
            "generation",
            None,
            None,
        )
        running = await app.until_state(job["id"], "running")
        waiting = (await app.post(headers=LATER).done()).json()
        assert (waiting["state"], waiting["position"], waiting["step"]) == ("queued", 1, 0)
        assert (running["step"], running["total_steps"], running["position"]) == (0, 5, None)
        steps = [0]
        for step in (1, 2, 3):
            app.record.allow(1)
            while (state := await app.job(job["id"]))["step"] < step:
                assert (state["state"], state["step"]) == ("running", step - 1)
            steps.append(state["step"])
        assert steps == [0, 1, 2, 3]
        app.record.release.set()
        state = await app.until_state(job["id"], "succeeded", "failed")
        assert (state["state"], state["step"], state["error"]) == ("succeeded", 5, None)
        assert state["result"]["data"][0]["seed"] == 1
        assert state["result"]["parameters"] == state["parameters"]
        image = base64.b64decode(state["result"]["data"][0]["b64_json"])
        assert image.startswith(PNG)
        await settled(app)
        assert await app.job(job["id"]) == state, "kept, it is what it was"
        assert app.outcomes() == {"succeeded": 2}


async def test_each_of_a_first_burst_has_its_own_place() -> None:
    """Of a server that has never timed anything: their ends cannot be foreseen, their order can."""
    alice, keys = {"Authorization": "Bearer 0123456789abcdef"}, "0123456789abcdef"
    async with serving(api_keys=keys) as app:
        app.record.gated = True
        posts = [app.post(headers=LATER | alice, seed=i) for i in range(8)]
        accepted = [(await post.done()).json() for post in posts]
        await app.until(lambda: app.record.running)

        async def places() -> dict[str, int | None]:
            listed = (await app.get("/v1/jobs", alice)).json()["data"]
            found = {
                job["id"]: job["position"]
                for job in listed
                if job["state"] in ("queued", "running")
            }
            assert found == {id: (await app.job(id, **alice))["position"] for id in found}
            assert {job["eta_seconds"] for job in listed} == {None}
            return found

        found = await places()
        [first] = [id for id, place in found.items() if place is None]
        waiting = sorted((id for id in found if id != first), key=lambda id: found[id] or 0)
        assert [found[id] for id in waiting] == list(range(1, 8))
        assert sorted(job["position"] or 0 for job in accepted) in (
            list(range(8)),
            list(range(1, 9)),
        )
        followed = app.send("GET", f"/v1/jobs/{waiting[5]}/events", headers=alice)
        await followed.until(lambda one: one.events)
        assert followed.events[0].data["position"] == 6
        await app.delete(f"/v1/jobs/{waiting.pop(2)}", alice)
        assert await places() == {first: None} | {id: place for place, id in enumerate(waiting, 1)}
        await followed.until(lambda one: len(one.events) > 1)
        assert (followed.events[1].data["position"], followed.events[1].data["eta_seconds"]) == (
            5,
            None,
        )
        urgent = (await app.post(headers=LATER | alice, priority="high").done()).json()
        assert urgent["position"] == 1
        assert (await places())[waiting[0]] == 2
        app.record.release.set()
        await settled(app)


@pytest.mark.full
async def test_a_first_burst_of_a_real_pipeline_is_told_what_is_true_to_its_end() -> None:
    pipeline = FAMILIES["stable_diffusion_3"].build()
    async with serving(pipeline, batching="step", max_jobs=2, max_pixels=128 * 128) as app:
        engine = app.server.engine
        assert engine is not None
        posts = [
            app.post(headers=LATER, seed=i, n=1 + i % 2, num_inference_steps=20 + i)
            for i in range(8)
        ]
        accepted = [(await post.done()).json() for post in posts]
        assert {post.status for post in posts} == {202}
        foreseen = 0
        while any(
            ticket.state in ("queued", "running") for ticket in list(app.server.active.values())
        ):
            positions = engine.queue_positions()
            places = [one.position for one in positions.values() if one.position]
            assert places == list(range(1, len(places) + 1))
            for job in [await app.job(one["id"]) for one in accepted]:
                assert (job["position"] is None) == (job["state"] != "queued")
                assert job["eta_seconds"] is None or job["eta_seconds"] > 0
                foreseen += job["eta_seconds"] is not None
            await asyncio.sleep(0.002)
        assert foreseen
        await settled(app)
        hopeless = await app.post(deadline_ms=1, num_inference_steps=40).done()
        assert (hopeless.status, hopeless.error["code"]) == (400, "deadline_too_short")


async def test_the_first_job_ever_is_foreseen_by_its_own_pace() -> None:
    async with serving() as app:
        app.record.gated = True
        id = await later(app, num_inference_steps=200)
        assert (await app.until_state(id, "running"))["eta_seconds"] is None
        app.record.pause = 0.01
        app.record.allow(3)
        await app.until(lambda: app.record.held_after(3))
        job = await app.job(id)
        assert (job["step"], job["position"]) == (3, None)
        assert job["eta_seconds"] > 0
        followed = app.send("GET", f"/v1/jobs/{id}/events")
        await followed.until(lambda one: one.events)
        assert followed.events[0].data["eta_seconds"] > 0
        # long after it was expected to be done
        with patch("stepweave.serving.request.time.monotonic", lambda: 1e12):
            assert app.server.active[id].latest().eta == 0.001, "it still runs"
        await app.delete(f"/v1/jobs/{id}")


async def test_results_are_urls_where_the_request_wants_them() -> None:
    async with serving() as app:
        id = await later(app, response_format="url", n=2)
        job = await app.until_state(id, "succeeded")
        urls = [one["url"] for one in job["result"]["data"]]
        assert len(set(urls)) == 2
        await settled(app)
        assert [one["url"] for one in (await app.job(id))["result"]["data"]] == urls
        assert files_of(app) == 2, "each image is stored once"
        for url in urls:
            assert url.startswith("http://localhost:3000/images/")
            image = await app.get(url.removeprefix("http://localhost:3000"))
            assert (image.status, image.headers["content-type"]) == (200, "image/png")
        assert (await app.delete(f"/v1/jobs/{id}")).json()["result"] is None
        assert files_of(app) == 0
        assert (await app.get(urls[0].removeprefix("http://localhost:3000"))).status == 404


async def test_a_running_job_is_cancelled_at_its_next_step_and_then_forgotten() -> None:
    async with serving() as app:
        app.record.gated = True
        id = await later(app, num_inference_steps=100)
        app.record.allow(3)
        await app.until(lambda: app.record.held_after(3))
        deleting = app.send("DELETE", f"/v1/jobs/{id}")
        await app.told_to_end()
        app.record.release.set()
        answer = await deleting.done()
        assert (answer.status, answer.json()["state"]) == (200, "cancelled")
        assert answer.json()["error"]["code"] == "cancelled"
        await settled(app)
        assert app.record.steps_run == answer.json()["step"] == 4
        assert app.metric("stepweave_steps_saved_total") == 96
        kept = await app.job(id)
        assert (kept["state"], kept["step"]) == ("cancelled", answer.json()["step"])
        assert (await app.delete(f"/v1/jobs/{id}")).json()["state"] == "cancelled"
        for method in ("GET", "DELETE"):
            gone = await app.send(method, f"/v1/jobs/{id}").done()
            assert (gone.status, gone.error["code"]) == (404, "job_not_found")
        assert app.outcomes() == {"cancelled": 1}


async def test_a_queued_job_is_cancelled_at_once() -> None:
    async with serving() as app:
        app.record.gated = True
        await later(app)
        waiting = await later(app, num_inference_steps=9)
        await app.until(lambda: app.record.running)
        calls = len(app.record.calls)
        answer = await app.delete(f"/v1/jobs/{waiting}")
        assert answer.json()["state"] == "cancelled"
        assert app.metric("stepweave_steps_saved_total") == 9
        app.record.release.set()
        await settled(app)
        assert len(app.record.calls) == calls, "it never ran"


async def test_an_answer_to_delete_does_not_wait_for_ever_for_a_step() -> None:
    async with serving() as app:
        app.record.gated = True
        id = await later(app)
        await asyncio.to_thread(app.record.started.wait)
        with patch("stepweave.api.routes.jobs.CANCEL_SECONDS", 0.02):
            assert (await app.delete(f"/v1/jobs/{id}")).json()["state"] == "running"
        app.record.release.set()
        assert (await app.until_state(id, "cancelled", "succeeded"))["state"] == "cancelled"
        assert app.record.steps_run == 1


async def test_a_job_outlives_its_client_and_its_followers() -> None:
    async with serving() as app:
        app.record.gated = True
        answer = app.post(headers=LATER)
        await answer.leave()
        [ticket] = app.server.active.values()
        follower = app.send("GET", f"/v1/jobs/{ticket.id}/events")
        await follower.until(lambda one: one.events)
        await follower.leave()
        app.record.release.set()
        await app.until_state(ticket.id, "succeeded")


async def test_a_failed_job_says_so_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as app:
        app.record.error = RuntimeError("secret /etc/passwd detail")
        id = await later(app)
        job = await app.until_state(id, "failed")
        await settled(app)
        kept = await app.get(f"/v1/jobs/{id}")
        assert kept.json() == job
        assert job["error"]["code"] == "generation_failed"
        assert (job["error"]["type"], job["error"]["param"], job["result"]) == (
            "server_error",
            None,
            None,
        )
        assert b"secret" not in kept.content
        assert "secret" in caplog.text
        assert app.outcomes() == {"failed": 1}


async def test_an_image_that_cannot_be_encoded_fails_the_job() -> None:
    async with serving() as app:
        with patch("stepweave.serving.results.encode", side_effect=OSError("encoder error -2")):
            id = await later(app, headers=KEY)
            job = await app.until_state(id, "failed", "succeeded")
            direct = await app.post().done()
        assert (job["state"], job["error"]["code"]) == ("failed", "generation_failed")
        assert direct.status == 500
        await settled(app)
        assert (await app.job(id))["state"] == "failed"
        assert (await app.post(headers=KEY).done()).status == 200, "the key is free again"
        assert app.outcomes() == {"failed": 2, "succeeded": 1}


async def test_a_job_that_is_late_fails() -> None:
    async with serving() as app:
        app.record.pause = 0.02
        id = await later(app, deadline_ms=50, num_inference_steps=100)
        job = await app.until_state(id, "failed")
        assert job["error"]["code"] == "deadline_exceeded"
        assert job["step"] < 10
        assert app.metric("stepweave_steps_saved_total") == 100 - job["step"]
        assert app.metric("stepweave_deadline_missed_total") == 1
        await settled(app)
        assert app.outcomes() == {"late": 1}


async def test_jobs_are_forgotten_after_their_time() -> None:
    async with serving(keep_seconds=0.05) as app:
        id = await later(app, response_format="url")
        await settled(app)
        await asyncio.sleep(0.06)
        jobs = app.server.jobs
        assert jobs is not None
        expired = await app.job(id)
        assert (expired["state"], expired["result"]) == ("succeeded", None)
        assert "have expired" in expired["warnings"][-1]
        await jobs.sweep()
        assert (await app.get(f"/v1/jobs/{id}")).error["code"] == "job_not_found"
        assert files_of(app) == 0


@pytest.mark.parametrize("id", ["0" * 32, "nope", "%00", "..%2F..%2Fjobs.sqlite", "x" * 5000])
@pytest.mark.parametrize("suffix", ["", "/events"])
async def test_jobs_that_there_are_none_of(id: str, suffix: str) -> None:
    async with serving() as app:
        answer = await app.get(f"/v1/jobs/{id}{suffix}")
        assert answer.status == 404
        assert answer.error["code"] == "job_not_found"
        assert len(answer.content) < 500


# --- the list, and whose jobs are whose ---


async def test_the_list_has_ones_own_jobs_newest_first() -> None:
    async with serving(api_keys="one,two") as app:
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        ids = [await later(app, headers=one) for _ in range(5)]
        foreign = await later(app, headers=two)
        await settled(app)
        app.record.gated = True
        app.record.started.clear()
        ids.append(await later(app, headers=one))
        await asyncio.to_thread(app.record.started.wait)
        await app.until_state(ids[-1], "running", **one)
        seen: list[Any] = []
        page = (await app.get("/v1/jobs?limit=4", one)).json()
        seen += page["data"]
        assert page["object"] == "list"
        page = (await app.get(f"/v1/jobs?limit=4&before={page['next']}", one)).json()
        seen += page["data"]
        assert page["next"] is None
        assert [job["id"] for job in seen] == ids[::-1]
        assert [job["state"] for job in seen] == ["running", *["succeeded"] * 5]
        assert all(job["result"] is None for job in seen)
        assert [job["id"] for job in (await app.get("/v1/jobs", two)).json()["data"]] == [foreign]
        for id, key in ((foreign, one), (ids[0], two), (ids[-1], two)):
            for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
                answer = await app.send(method, f"/v1/jobs/{id}{path}", headers=key).done()
                assert (answer.status, answer.error["code"]) == (404, "job_not_found")
        assert (await app.job(foreign, **two))["state"] == "succeeded"
        for query in (
            "limit=0",
            "limit=101",
            "limit=-1",
            "limit=x",
            "limit=",
            "limit=%C2%B2",
            "limit=1e1",
            "before=x",
            "before=nan_" + "0" * 32,
            "before=",
            "order=asc",
        ):
            answer = await app.get(f"/v1/jobs?{query}", one)
            assert answer.status == 400
            assert answer.error["param"] == query.partition("=")[0]


async def test_without_keys_there_is_no_list() -> None:
    async with serving() as app:
        id = await later(app)
        answer = await app.get("/v1/jobs")
        assert (answer.status, answer.error["code"]) == (404, "jobs_list_disabled")
        assert id.encode() not in answer.content
        await settled(app)


# --- over restarts ---


async def test_what_a_killed_server_leaves(tmp_path: Path) -> None:
    async with started(state_dir=str(tmp_path / "state")) as app:
        done = await later(app, n=2, headers={"Idempotency-Key": "done"})
        await settled(app)
        before = await app.job(done)
        app.record.gated = True
        app.record.started.clear()
        running = await later(app, headers={"Idempotency-Key": "lost"})
        queued = await later(app)
        await asyncio.to_thread(app.record.started.wait)
        store = app.server.jobs.store  # type: ignore[union-attr]
        async with asyncio.timeout(SECONDS):
            while (await store.get(running)).state != "running":  # type: ignore[union-attr]  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        shutil.copytree(tmp_path / "state", tmp_path / "left")  # as a kill at this moment leaves it
        steps = app.record.steps_run
    async with serving(state_dir=str(tmp_path / "left")) as app:
        assert await app.job(done) == before
        for id, was in ((running, "running"), (queued, "queued")):
            job = await app.job(id)
            assert (job["state"], job["error"]["code"]) == ("failed", "restarted")
            assert was in job["error"]["message"]
            told = await app.get(f"/v1/jobs/{id}/events")
            assert [(one.name, one.data["error"]) for one in told.events] == [
                ("error", job["error"])
            ]
        again = await app.post(headers={"Idempotency-Key": "done"}, n=2).done()
        assert again.json() == before["result"]
        assert app.record.steps_run == 0, "it was not made once more"
        anew = await app.post(headers={"Idempotency-Key": "lost"}).done()
        assert anew.status == 200
        assert app.record.steps_run == 4
    assert steps < 12


async def test_an_orderly_end_keeps_what_was_accepted(tmp_path: Path) -> None:
    async with started(state_dir=str(tmp_path)) as app:
        app.record.gated = True
        ids = [await later(app) for _ in range(3)]
        asyncio.get_running_loop().call_later(0.05, app.record.release.set)
        await app.server.shut_down()
    async with serving(state_dir=str(tmp_path)) as app:
        assert {(await app.job(id))["state"] for id in ids} == {"succeeded"}


async def test_an_end_waits_for_a_job_that_is_just_being_accepted(tmp_path: Path) -> None:
    async with started(state_dir=str(tmp_path)) as app:
        gate, put = asyncio.Event(), SqliteJobStore.put

        async def slow(store: SqliteJobStore, record: Any) -> None:
            await gate.wait()
            await put(store, record)

        with patch.object(SqliteJobStore, "put", slow):
            answer = app.post(headers=LATER)
            await app.until(lambda: app.server.active)
            ending = asyncio.ensure_future(app.server.shut_down())
            await app.until(lambda: not app.server.active)
            gate.set()
            await ending
        id = (await answer.done()).json()["id"]
    async with serving(state_dir=str(tmp_path)) as app:
        assert (await app.job(id))["state"] == "succeeded"


# --- a store that fails ---


def at_once() -> Any:
    """What could not be stored is tried once more at once."""
    return patch("stepweave.serving.jobs.KEEP_AGAIN_SECONDS", (0.0,))


async def test_a_store_that_fails_for_a_while_keeps_the_result() -> None:
    async with serving() as app:
        put, failures = DirectoryFileStore.put, [StepweaveError("full", code="store_failed")]

        async def recovers(store: DirectoryFileStore, *args: Any) -> str:
            if failures:
                raise failures.pop()
            return await put(store, *args)

        with at_once(), patch.object(DirectoryFileStore, "put", recovers):
            id = await later(app)
            await settled(app)
        assert (await app.job(id))["state"] == "succeeded"


async def test_a_job_that_cannot_be_noted_is_not_promised() -> None:
    async with serving() as app:
        with patch.object(
            SqliteJobStore, "put", side_effect=StepweaveError("full", code="store_failed")
        ):
            app.record.gated = True
            answer = await app.post(headers=LATER).done()
            assert answer.status == 500
            app.record.release.set()
            await settled(app)
        assert app.record.steps_run <= 1
        assert app.outcomes() == {"failed": 1}, "as it was answered"


async def test_a_result_that_cannot_be_stored_fails_the_job() -> None:
    async with serving() as app:
        full = StepweaveError("full", code="store_failed")
        with at_once(), patch.object(DirectoryFileStore, "put", side_effect=full):
            id = await later(app)
            await settled(app)
        job = await app.job(id)
        assert (job["state"], job["error"]["code"]) == ("failed", "store_failed")


async def test_a_job_whose_end_could_not_be_noted_is_not_running_for_ever() -> None:
    async with serving() as app:
        app.record.gated = True
        id = await later(app, headers=KEY)
        full = StepweaveError("full", code="store_failed")
        with at_once(), patch.object(SqliteJobStore, "put", side_effect=full):
            app.record.release.set()
            await settled(app)
        job = await app.job(id)
        assert (job["state"], job["error"]["code"]) == ("failed", "store_failed")
        assert (await app.get(f"/v1/jobs/{id}/events")).names == ["error"]
        assert (await app.post(headers=KEY).done()).status == 200


# --- idempotency keys ---


async def test_requests_of_one_key_are_one_job() -> None:
    async with serving() as app:
        app.record.gated = True
        at_once = [app.post(headers=KEY) for _ in range(3)]
        await joined(app, 3)
        other = await app.post(headers=KEY, seed=2).done()
        assert (other.status, other.error["code"], other.error["param"]) == (
            409, "idempotency_conflict", "Idempotency-Key",
        )  # fmt: skip
        assert "'k'" in other.error["message"]
        app.record.release.set()
        answers = [(await one.done()).content for one in at_once]
        answers.append((await app.post(headers=KEY).done()).content)
        await settled(app)
        answers.append((await app.post(headers=KEY).done()).content)
        assert len(set(answers)) == 1
        assert (await app.post(headers=KEY, seed=2).done()).status == 409
        assert app.record.steps_run == 4
        later = await app.post(headers=KEY | LATER).done()
        assert (later.status, later.json()["state"]) == (202, "succeeded")
        assert later.json()["result"] == json.loads(answers[0])
        assert app.outcomes() == {"succeeded": 6, "invalid": 2}


async def test_urls_of_one_key_are_the_same() -> None:
    async with serving() as app:
        at_once = [app.post(headers=KEY, response_format="url") for _ in range(2)]
        answers = [(await one.done()).content for one in at_once]
        await settled(app)
        answers.append((await app.post(headers=KEY, response_format="url").done()).content)
        assert len(set(answers)) == 1
        assert files_of(app) == 1


async def test_another_media_type_is_another_request() -> None:
    async with serving() as app:
        image = await app.post(headers=KEY | {"Accept": "image/webp"}).done()
        assert (image.status, image.headers["content-type"]) == (200, "image/webp")
        await settled(app)
        again = await app.post(headers=KEY | {"Accept": "image/webp"}).done()
        assert again.content == image.content
        assert again.headers["content-type"] == "image/webp"
        assert (await app.post(headers=KEY).done()).status == 409, (
            "it would be given a WebP file for a PNG"
        )


async def test_a_failed_or_cancelled_job_frees_its_key() -> None:
    async with serving() as app:
        app.record.error = RuntimeError("x")
        failed = await app.post(headers=KEY).done()
        assert failed.status == 500
        assert (await app.post(headers=KEY).done()).status == 500, "tried anew"
        assert len(app.record.calls) == 2
        app.record.error = None
        app.record.gated = True
        id = await later(app, headers=KEY)
        await app.until(lambda: app.record.running)
        with patch("stepweave.api.routes.jobs.CANCEL_SECONDS", 0.01):
            await app.delete(f"/v1/jobs/{id}")
        anew = [app.post(headers=KEY) for _ in range(2)]  # while the first is on its way out
        await app.until(lambda: len(app.server.active) == 2)
        app.record.release.set()
        assert [(await one.done()).status for one in anew] == [200, 200]
        assert app.outcomes() == {"failed": 2, "cancelled": 1, "succeeded": 2}


async def test_a_failing_job_of_a_key_is_made_once_for_each_request() -> None:
    """Even if it ends before it has been noted."""
    async with serving() as app:
        put = SqliteJobStore.put

        async def slow(store: SqliteJobStore, record: Any) -> None:
            await app.until(lambda: not app.server.active)
            await put(store, record)

        app.record.error = RuntimeError("x")
        with patch.object(SqliteJobStore, "put", slow):
            assert (await app.post(headers=KEY).done()).status == 500
        assert len(app.record.calls) == 1


async def test_the_end_of_a_failed_job_does_not_free_the_key_of_the_next() -> None:
    async with serving() as app:
        put, gate = SqliteJobStore.put, asyncio.Event()

        async def slow(store: SqliteJobStore, record: Any) -> None:
            if record.state == "failed":
                await gate.wait()
            await put(store, record)

        with patch.object(SqliteJobStore, "put", slow):
            app.record.error = RuntimeError("x")
            assert (await app.post(headers=KEY).done()).status == 500
            app.record.error = None
            app.record.gated = True
            second = app.post(headers=KEY)
            await joined(app, 1)
            opening = dict(app.server.jobs._open)  # type: ignore[union-attr]
            gate.set()
            await app.until(lambda: len(app.server.jobs.keeping()) == 1)  # type: ignore[union-attr]
            assert app.server.jobs._open == opening  # type: ignore[union-attr]
            third = app.post(headers=KEY)
            await joined(app, 2)
            app.record.release.set()
            assert (await second.done()).content == (await third.done()).content


async def test_a_job_lives_as_long_as_one_waits_for_it() -> None:
    async with serving() as app:
        for order in ((0, 1), (1, 0)):
            app.record.gated, app.record.steps_run, app.record.steps_begun = True, 0, 0
            app.record.release.clear()
            pair = [
                app.post(headers=KEY, num_inference_steps=100, seed=sum(order) * order[0])
                for _ in range(2)
            ]
            await joined(app, 2)
            await app.until(lambda: app.record.running)
            await pair[order[0]].leave()
            app.record.allow(3)
            await app.until(lambda: app.record.held_after(3))
            await app.leave(pair[order[1]])
            await settled(app)
            assert app.record.steps_run == 4
        assert app.outcomes() == {"cancelled": 4}


async def test_a_stream_and_an_answer_of_one_key() -> None:
    async with serving() as app:
        app.record.gated = True
        stream = app.post(headers=KEY | {"Accept": "text/event-stream"})
        answer = app.post(headers=KEY)
        await joined(app, 2)
        await stream.leave()
        app.record.release.set()
        assert (await answer.done()).status == 200


async def test_who_is_told_to_come_back_may_rely_on_it() -> None:
    async with serving() as app:
        app.record.gated = True
        first = app.post(headers=KEY)
        await joined(app, 1)
        id = await later(app, headers=KEY)
        await first.leave()
        app.record.release.set()
        await app.until_state(id, "succeeded")


def slow_accept(gate: asyncio.Event, begun: asyncio.Semaphore, ended: asyncio.Semaphore) -> Any:
    accept = Server.accept

    async def slow(server: Server, *args: Any, **kwargs: Any) -> ActiveRequest:
        begun.release()
        try:
            await gate.wait()
            return await accept(server, *args, **kwargs)
        finally:
            ended.release()

    return patch.object(Server, "accept", slow)


async def test_the_first_leaves_while_it_is_accepted() -> None:
    async with serving() as app:
        gate, begun = asyncio.Event(), asyncio.Semaphore(0)
        app.record.gated = True
        with slow_accept(gate, begun, asyncio.Semaphore(0)):
            first, second = app.post(headers=KEY), app.post(headers=KEY)
            await begun.acquire()
            # the second may have found the first meanwhile, or does so later
            await asyncio.sleep(0.01)
            await first.leave()
            gate.set()
            await joined(app, 1)
            app.record.release.set()
            assert (await second.done()).status == 200
        assert app.outcomes() == {"cancelled": 1, "succeeded": 1}


async def test_all_leave_while_it_is_accepted() -> None:
    async with serving() as app:
        gate, begun, ended = asyncio.Event(), asyncio.Semaphore(0), asyncio.Semaphore(0)
        app.record.gated = True
        with slow_accept(gate, begun, ended):
            for headers, accepted in (({}, 2), (KEY, 1)):
                both = [app.post(headers=headers, num_inference_steps=100) for _ in range(2)]
                for _ in range(accepted):
                    await begun.acquire()
                await asyncio.sleep(0.01)
                for one in both:
                    await one.leave()
            gate.set()
            for _ in range(3):
                await ended.acquire()
            await app.told_to_end()
            app.record.release.set()
            await settled(app)
        assert app.record.steps_run <= 1, "of 100"
        assert app.outcomes() == {"cancelled": 4}


@pytest.mark.parametrize("key", ["", "x" * 256, "a\x01b", "a\tb", "\x7f", "a\x85"])
async def test_keys_that_are_none(key: str) -> None:
    async with serving() as app:
        answer = await app.post(headers={"Idempotency-Key": key}).done()
        assert (answer.status, answer.error["param"]) == (400, "Idempotency-Key")
        assert app.outcomes() == {"invalid": 1}


@pytest.mark.parametrize("key", ["x" * 255, "Schlüssel 1", " ' OR 1=1 --"])
async def test_keys_of_any_kind(key: str) -> None:
    async with serving() as app:
        answers = [await app.post(headers={"Idempotency-Key": key}).done() for _ in range(2)]
        await settled(app)
        answers.append(await app.post(headers={"Idempotency-Key": key}).done())
        assert len({one.content for one in answers}) == 1


async def test_keys_are_their_owners() -> None:
    async with serving(api_keys="one,two") as app:
        answers = []
        for seed, key in enumerate(("one", "two")):
            headers = KEY | {"Authorization": f"Bearer {key}"}
            answers.append(
                (await app.post(headers=headers, seed=seed).done()).json()["data"][0]["seed"]
            )
        assert answers == [0, 1]


async def test_a_refusal_is_not_remembered() -> None:
    async with serving(max_queue=0) as app:
        app.record.gated = True
        first = app.post()
        await joined(app, 1)
        refused = [app.post(headers=KEY) for _ in range(2)]
        for one in refused:
            assert (await one.done()).status == 429
            assert one.error["type"] == "rate_limit_error"
            assert int(one.headers["retry-after"]) >= 1
        app.record.release.set()
        await first.done()
        await settled(app)
        assert (await app.post(headers=KEY).done()).status == 200


async def test_a_key_whose_images_have_expired_makes_them_anew() -> None:
    async with serving() as app:
        first = await app.post(headers=KEY).done()
        await settled(app)
        jobs = app.server.jobs
        assert jobs is not None
        [record] = await jobs.store.list(None, 1)
        await jobs.files.delete(record.files)
        second = await app.post(headers=KEY).done()
        assert second.status == 200
        assert second.json()["data"] == first.json()["data"]
        assert app.record.steps_run == 8


def form(boundary: str, image: bytes, **fields: str) -> tuple[bytes, dict[str, str]]:
    """A multipart body and its headers."""
    parts = [
        f'Content-Disposition: form-data; name="{name}"\r\n\r\n{text}'.encode()
        for name, text in fields.items()
    ]
    head = (
        b'Content-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: '
        b"image/png\r\n\r\n"
    )
    parts.append(head + image)
    mark = boundary.encode()
    body = (
        b"".join(b"--" + mark + b"\r\n" + part + b"\r\n" for part in parts)
        + b"--"
        + mark
        + b"--\r\n"
    )
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


async def test_edits_are_told_apart_by_what_the_form_holds() -> None:
    async with serving(FakePipeline(edits=True)) as app:
        image = base64.b64decode((await app.post().done()).json()["data"][0]["b64_json"])
        other = base64.b64decode((await app.post(seed=2).done()).json()["data"][0]["b64_json"])
        await settled(app)
        steps = app.record.steps_run

        def edit(boundary: str, image: bytes = image, **fields: str) -> Exchange:
            fields = {
                "prompt": "a star",
                "seed": "3",
                "num_inference_steps": "4",
                "strength": "1",
            } | fields
            body, headers = form(boundary, image, **fields)
            return app.send("POST", "/v1/images/edits", body, headers | KEY)

        app.record.gated = True
        at_once = [edit("one"), edit("two")]
        await joined(app, 2)
        for unlike in (edit("three", strength="0.5"), edit("four", other)):
            assert (await unlike.done()).status == 409
        app.record.release.set()
        assert [(await one.done()).status for one in at_once] == [200, 200]
        assert at_once[0].content == at_once[1].content
        assert app.record.steps_run == steps + 4
        generation = await app.post(headers=KEY).done()
        assert generation.status == 200, "the key of another route is another"
        id = (
            await app.send("POST", "/v1/images/edits", *form("x", image, prompt="a")).done()
        ).json()
        assert id["parameters"]["prompt"] == "a"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--x--"),
        ("multipart/form-data; boundary=x", b"garbage"),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n",
        ),
        ("multipart/form-data; boundary=x", b"--x\r\n\x00\xff: a\r\n\r\na\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", form("x", PNG, **{f"f{i}": "" for i in range(70)})[0]),
        ("multipart/form-data; boundary=x", form("x", PNG, prompt="x" * 70_000)[0]),
    ],
)
async def test_forms_that_cannot_be_read(content_type: str, body: bytes) -> None:
    async with serving(FakePipeline(edits=True)) as app:
        answer = await app.send(
            "POST", "/v1/images/edits", body, {"Content-Type": content_type}
        ).done()
        assert answer.status == 400
        assert answer.error["code"] in ("invalid_form", "missing_field")
        assert app.outcomes() == {"invalid": 1}


# --- following a job ---


async def test_events_from_the_middle_and_after_the_end() -> None:
    async with serving() as app:
        app.record.gated = True
        id = await later(app, num_inference_steps=30)
        await app.until_state(id, "running")
        queued = await later(app, n=2)
        waiting = app.send("GET", f"/v1/jobs/{queued}/events")
        await waiting.until(lambda one: one.names == ["stepweave.queued"])
        assert waiting.events[0].data["position"] == 1
        app.record.allow(6)
        await app.until(lambda: app.record.held_after(6))
        middle = app.send("GET", f"/v1/jobs/{id}/events")
        await middle.until(lambda one: one.events)
        app.record.release.set()
        await middle.done()
        assert middle.names[0] == "stepweave.progress"
        assert middle.events[0].data["step"] in (5, 6)
        assert middle.names[-1] == "image_generation.completed"
        await waiting.done()
        assert [
            one.data["image_index"] for one in waiting.events if one.name.endswith("completed")
        ] == [0, 1]
        await settled(app)
        after = await app.get(f"/v1/jobs/{id}/events")
        assert after.events == middle.events[-1:]
        assert after.headers["content-type"].startswith("text/event-stream")


async def test_events_of_jobs_that_did_not_succeed() -> None:
    async with serving() as app:
        app.record.gated = True
        id = await later(app)
        told = app.send("GET", f"/v1/jobs/{id}/events")
        await told.until(lambda one: one.events)
        deleting = app.send("DELETE", f"/v1/jobs/{id}")
        await app.told_to_end()
        app.record.release.set()
        await deleting.done()
        await told.done()
        assert told.events[-1].name == "error"
        assert told.events[-1].data["error"]["code"] == "cancelled"
        await settled(app)
        after = await app.get(f"/v1/jobs/{id}/events")
        assert after.events == told.events[-1:]


async def test_a_job_is_soon_told_of_large_results() -> None:
    """What is asked for later is not read and written as JSON on the loop: that would hold up all
    others."""
    async with serving() as app:
        id = await later(app)
        await settled(app)
        size = 8_000_000
        on_loop: list[bool] = []

        def encode(data: bytes, real: Any = base64.b64encode) -> Any:
            on_loop.append(threading.current_thread() is threading.main_thread())
            return real(data)

        def to_json(resource: Resource, real: Any = Resource.to_json) -> Any:
            on_loop.append(threading.current_thread() is threading.main_thread())
            return real(resource)

        read = DirectoryFileStore._read

        def large(store: DirectoryFileStore, name: str) -> Any:
            found = read(store, name)
            assert found is not None
            return type(found)(found.data + bytes(size), found.media_type, found.expires_in)

        with (
            patch.object(DirectoryFileStore, "_read", large),
            patch.object(base64, "b64encode", encode),
            patch.object(Resource, "to_json", to_json),
        ):
            job = await app.job(id)
        assert len(job["result"]["data"][0]["b64_json"]) > size
        assert on_loop == [False, False]
