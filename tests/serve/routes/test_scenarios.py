"""Scenarios over HTTP: listed with what they need, answered by every kind of output, refused in one sentence."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import replace

import httpx
import numpy as np
import pytest
import soundfile
from PIL import Image

from openm6.inference.load import LoadedModel
from openm6.modalities.image import read_image, to_square
from openm6.models.description import TrainedTask
from openm6.serve.config import EngineConfig
from openm6.serve.engine import Engine
from openm6.serve.run import create_app
from openm6.serve.scenarios.run import example_values
from openm6.serve.scenarios.scenario import read_library
from tests.serve.running import running
from tests.small_model import embedding_model

TASKS = (
    "couplet_completion",
    "image_captioning",
    "image_inpainting",
    "text_to_speech",
    "tabular_regression",
    "product_search",
    "image_text_retrieval",
    "text_to_sketch",
)


def trained_model() -> LoadedModel:
    """The untrained model with a checkpoint that names some trained tasks."""
    model = embedding_model()
    trained_tasks = [TrainedTask(task=name, source="x") for name in TASKS]
    return replace(model, description=model.description.model_copy(update={"trained_tasks": trained_tasks}))


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    app = create_app(Engine(trained_model(), EngineConfig(max_model_len=512)), name="tiny")
    with running(app) as address, httpx.Client(base_url=address, timeout=60) as found:
        yield found


def body(name: str, language: str = "en") -> dict[str, object]:
    """A scenario's example as JSON."""
    values = example_values(read_library().scenarios[name], language)  # type: ignore[arg-type]
    inputs = {
        key: base64.b64encode(value).decode() if isinstance(value, bytes) else value for key, value in values.items()
    }
    return {"inputs": inputs, "language": language, "seed": 3}


def test_all_are_listed_with_what_they_need(client: httpx.Client) -> None:
    found = {entry["id"]: entry for entry in client.get("/v1/scenarios").json()["data"]}
    assert set(found) == set(read_library().scenarios)
    assert found["couplet"]["ready"] and found["couplet"]["needs"] == []
    restyle = found["restyle"]
    assert not restyle["ready"] and restyle["needs"] == ["style_transfer"] and restyle["recipe"] == "design"
    assert "needs training on style_transfer" in restyle["state"]["en"]
    one = client.get("/v1/scenarios/restyle").json()
    assert {key: value for key, value in one.items() if key != "examples"} == restyle


@pytest.mark.parametrize("name", ["couplet", "fill_region", "missing_measurement"])
def test_an_example_can_be_sent_as_it_is(client: httpx.Client, name: str) -> None:
    examples = client.get(f"/v1/scenarios/{name}").json()["examples"]
    assert set(examples) == {"en", "zh"}
    sent = {"inputs": examples["en"], "language": "en", "seed": 1}
    assert client.post(f"/v1/scenarios/{name}", json=sent).status_code == 200


def test_an_untrained_scenario_is_refused_with_its_recipe(client: httpx.Client) -> None:
    refused = client.post("/v1/scenarios/restyle", json=body("restyle"))
    assert refused.status_code == 400
    said = refused.json()["error"]["message"]
    assert said.startswith("scenario restyle needs training on style_transfer (openm6 train design)")


def test_text_comes_back_and_repeats(client: httpx.Client) -> None:
    first, second = (client.post("/v1/scenarios/couplet", json=body("couplet", "zh")).json() for _ in range(2))
    assert first["output"] == "text" and isinstance(first["text"], str) and first["seed"] == 3
    assert first["text"] == second["text"] and first["image"] is None


def test_a_filled_image_keeps_what_lies_outside(client: httpx.Client) -> None:
    asked = body("fill_region")
    found = client.post("/v1/scenarios/fill_region", json=asked).json()
    after = Image.open(io.BytesIO(base64.b64decode(found["image"].partition(",")[2])))
    given = read_image(base64.b64decode(asked["inputs"]["image"]))  # type: ignore[index]
    before, changed = np.asarray(to_square(given, 64)), np.asarray(after)
    assert (changed[:15] == before[:15]).all() and (changed[:, 50:] == before[:, 50:]).all()
    assert (changed[16:48, 16:48] != before[16:48, 16:48]).any()


def test_it_is_said_whether_the_words_were_trained(client: httpx.Client) -> None:
    found = client.post("/v1/scenarios/couplet", json=body("couplet", "zh")).json()
    assert found["trained"] and found["note"] is None


def test_audio_comes_back(client: httpx.Client) -> None:
    found = client.post("/v1/scenarios/read_aloud", json=body("read_aloud")).json()
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(found["audio"])))
    assert rate == 16_000 and len(samples) == pytest.approx(1.2 * rate, abs=640)


def test_numbers_a_ranking_and_a_vector_come_back(client: httpx.Client) -> None:
    numbers = client.post("/v1/scenarios/missing_measurement", json=body("missing_measurement")).json()
    mass = numbers["numbers"]["body_mass_g"]
    assert mass["low"] <= mass["median"] <= mass["high"]
    ranking = client.post("/v1/scenarios/search_ranking", json=body("search_ranking")).json()["ranking"]
    assert sorted(ranked["index"] for ranked in ranking) == [0, 1, 2]
    assert ranking[0]["score"] >= ranking[1]["score"] >= ranking[2]["score"]
    vector = client.post("/v1/scenarios/image_search_vector", json=body("image_search_vector")).json()
    assert len(vector["embedding"]) == 16


@pytest.mark.parametrize(
    ("name", "sent", "status", "said"),
    [
        ("nothing", {"inputs": {"a": "b"}}, 404, "no scenario is called"),
        ("couplet", {"inputs": {}}, 400, "inputs"),
        ("couplet", {"inputs": {"lines": "x"}}, 400, "did you mean 'line'"),
        ("couplet", {"inputs": {"line": "x"}, "language": "fr"}, 400, "language"),
        ("fill_region", {"inputs": {"image": "x", "mask_box": [0, 0, 1, 1]}}, 400, "base64"),
        ("fill_region", {"inputs": {"image": "eHg=", "mask_box": [0, 0, 1, 1]}}, 400, "not a readable image"),
        ("missing_measurement", {"inputs": {"numbers": {"hmm": 1}}}, 400, "has no column"),
        ("couplet", {"inputs": {"line": "x" * 30_000}}, 400, "characters"),
    ],
)
def test_broken_requests_are_one_sentence(
    client: httpx.Client, name: str, sent: dict[str, object], status: int, said: str
) -> None:
    refused = client.post(f"/v1/scenarios/{name}", json=sent)
    assert refused.status_code == status, refused.text
    assert said in refused.json()["error"]["message"]
