"""The page of ``lightning serve``: what it draws, over real HTTP, in a browser, and what it refuses."""

import copy
import json
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import TextModel, make_pipeline
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from nami_lightning.cli.main import main
from nami_lightning.models.flow import SolverKind
from nami_lightning.models.lora import LoraSettings, add_adapter
from nami_lightning.pipelines.lora import save_lora
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.pipelines.png_settings import read_settings
from nami_lightning.serving.costs import cost_table, stage_costs
from nami_lightning.serving.drawing import Settings, StageDrawn, StepDone, Stopped, Studio
from nami_lightning.serving.server import check_port, import_gradio, is_own, serving

pytest_plugins = "helpers.tiny_models"

HARMFUL = "<img src=x onerror=document.title='harmed'>"
SETTINGS = Settings("a red cat", "", 7, 16, 16, [2, 1, 3], [1.0, 2.0, 1.0], "euler")


@pytest.fixture
def pipeline(t5: TextModel, clip: TextModel) -> NamiPipeline:
    return make_pipeline(t5, clip, stages=3)


@pytest.fixture
def lora(pipeline: NamiPipeline, tmp_path: Path) -> Path:
    """A LoRA whose folder has a harmful name."""
    network = copy.deepcopy(pipeline.transformer)
    add_adapter(network, LoraSettings(rank=4))
    torch.manual_seed(8)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    save_lora(tmp_path / HARMFUL.replace("/", ""), network)
    return tmp_path / HARMFUL.replace("/", "")


def drawn(studio: Studio, settings: Settings = SETTINGS, **options: Any) -> list[StageDrawn]:
    return [event for event in studio.draw(settings, **options) if isinstance(event, StageDrawn)]


def pixels(image: Any) -> np.ndarray:
    with Image.open(image) if isinstance(image, str | Path) else image as opened:
        return np.asarray(opened.convert("RGB"))


def plain(pipeline: Any, settings: Settings = SETTINGS) -> np.ndarray:
    """Return the image that the pipeline draws by itself."""
    image = pipeline(
        settings.prompt,
        negative_prompt=settings.negative_prompt,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        solver=settings.solver,
        generator=torch.Generator().manual_seed(settings.seed),
    ).images[0]
    return pixels(image)


# --- drawing ---------------------------------------------------------------------------------------


def test_stages_come_in_order_and_the_last_is_the_pipelines_image(pipeline: NamiPipeline) -> None:
    events = list(Studio(pipeline).draw(SETTINGS))
    assert [(type(event), event.stage) for event in events] == [
        (StepDone, 0),
        (StageDrawn, 0),
        (StageDrawn, 1),
        (StepDone, 2),
        (StepDone, 2),
        (StageDrawn, 2),
    ]
    stages = [event for event in events if isinstance(event, StageDrawn)]
    assert [stage.image.size for stage in stages] == [(4, 4), (8, 8), (16, 16)]
    assert all(stage.seconds > 0 for stage in stages)
    np.testing.assert_array_equal(pixels(stages[-1].image), plain(pipeline))


def test_a_lora_changes_the_image_and_off_it_is_the_base_bit_for_bit(pipeline: NamiPipeline, lora: Path) -> None:
    base = plain(pipeline)
    studio = Studio(pipeline, [f"{lora}:0.5", str(lora)])
    first, second = studio.weights
    assert studio.weights == {lora.name: 0.5, f"{lora.name} (2)": 1.0}
    images = [
        pixels(drawn(studio, replace(SETTINGS, loras=loras))[-1].image)
        for loras in ({}, {first: 1.0}, {second: 1.0}, {first: 0.25}, {})
    ]
    np.testing.assert_array_equal(images[0], base)
    np.testing.assert_array_equal(images[4], base)
    np.testing.assert_array_equal(images[1], images[2])
    assert np.abs(images[1].astype(int) - base).max() > 3
    assert np.abs(images[1].astype(int) - images[3]).max() > 3


def test_it_stops_after_the_step_that_runs_and_draws_again(pipeline: NamiPipeline) -> None:
    studio, asked = Studio(pipeline), count()
    with pytest.raises(Stopped):
        drawn(studio, stopped=lambda: next(asked) == 2)
    assert next(asked) == 3  # before the first step, and after each of two
    left = studio.draw(replace(SETTINGS, steps=[1, 1, 500]))  # a closed page: nobody asks for its events any more
    next(left)
    left.close()
    np.testing.assert_array_equal(pixels(drawn(studio)[-1].image), plain(pipeline))


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_operations_are_those_that_torch_counts(pipeline: NamiPipeline, solver: SolverKind) -> None:
    settings = replace(SETTINGS, solver=solver)
    costs = stage_costs(pipeline, settings)
    counts: dict[int, int] = {}
    network = pipeline.transformer.forward

    def counted(x: Any, *inputs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            output = network(x, *inputs)
        counts[pipeline.stage] = counts.get(pipeline.stage, 0) + counter.get_total_flops()
        return output

    pipeline.transformer.forward = counted
    plain(pipeline, settings)
    assert [cost.size for cost in costs] == [(4, 4), (8, 8), (16, 16)]
    assert [cost.operations for cost in costs] == list(counts.values())


def test_the_table_says_what_is_an_estimate(pipeline: NamiPipeline) -> None:
    costs = stage_costs(pipeline, SETTINGS)
    assert costs[2].flux_base == costs[2].operations  # the last stage runs all blocks at the finest resolution
    assert costs[0].flux_base == costs[2].operations * 2 // 3  # two steps of three
    assert costs[1].flux_base == costs[2].operations * 2 // 3  # one step of three, guided
    part, whole = (cost_table(SETTINGS, costs, seconds) for seconds in ([0.5], [0.5, 0.25, 3.0]))
    assert "0.50" in part
    assert "…" in part
    assert "…" not in whole
    assert "<td>all</td><td></td><td>6</td><td></td>" in whole
    assert ">3.75</td>" in whole
    assert ">7.00</td>" in whole  # 3 s for three steps: 2 s for each other stage
    assert "FLUX-base is an estimate" in whole


# --- over HTTP -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def studio(pipeline: NamiPipeline, lora: Path) -> Studio:
    return Studio(pipeline, [str(lora)])


@pytest.fixture
def address(studio: Studio) -> Iterator[str]:
    pytest.importorskip("gradio")
    with serving(studio, {"model": HARMFUL, "weights": "abc"}, free_port()) as address:
        yield address


@pytest.fixture
def client(address: str) -> Any:
    from gradio_client import Client

    return Client(address, verbose=False, max_workers=60)


def arguments(**changes: Any) -> list[Any]:
    """Return the values of the page's controls for ``SETTINGS``, with the LoRA off."""
    named = {"prompt": "a red cat", "negative": "", "seed": 7, "random": False, "height": 16, "width": 16}
    named |= {"solver": "euler", "steps1": 2, "steps2": 1, "steps3": 3, "guidance1": 1, "guidance2": 2, "guidance3": 1}
    return list((named | {"lora": False, "weight": 1} | changes).values())


def test_the_stages_appear_one_after_another(client: Any, pipeline: NamiPipeline) -> None:
    job = client.submit(*arguments(), api_name="/draw")
    *_, gallery = final = job.result()
    shown = [[number for number in range(3) if isinstance(output[number], str)] for output in job.outputs()]
    assert [numbers for numbers in shown if numbers] == [[0], [1], [2], [0, 1, 2]]
    assert [Image.open(path).size for path in final[:3]] == [(4, 4), (8, 8), (16, 16)]
    np.testing.assert_array_equal(pixels(final[2]), plain(pipeline))
    settings = read_settings(Path(final[2]))
    assert settings is not None
    assert (
        settings["drawn"] | {"prompt": "a red cat", "seed": 7, "steps": [2, 1, 3], "weights": "abc"}
        == settings["drawn"]
    )
    assert gallery["value"][0]["caption"] == "a red cat, seed 7"
    client.predict(*arguments(random=True), api_name="/draw")
    gallery = client.predict(*arguments(lora=True), api_name="/draw")[-1]
    assert len(gallery["value"]) == 3
    assert gallery["value"][0]["caption"].startswith("a red cat, seed 7, <img")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"width": 18}, "width"),
        ({"width": 100_000}, "100000"),
        ({"steps2": None}, "a number is missing"),
        ({"steps2": 0}, "0"),
    ],
)
def test_bad_input_is_one_message(client: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        client.predict(*arguments(**changes), api_name="/draw")
    assert "Traceback" not in str(caught.value)


def test_an_image_that_is_not_finite_is_one_message(client: Any, pipeline: NamiPipeline) -> None:
    with torch.no_grad():
        pipeline.transformer.proj_out.bias.fill_(torch.nan)
    with pytest.raises(Exception, match=r"NaN or infinite values in image 0 .*since stage 1") as caught:
        client.predict(*arguments(prompt=f"{HARMFUL} cat"), api_name="/draw")
    assert "<img" not in str(caught.value)


def test_fifty_drawings_at_once_are_drawn_or_told_to_wait(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    gradio_client = pytest.importorskip("gradio_client")
    monkeypatch.setattr("nami_lightning.serving.server.WAITING", 3)
    with serving(studio, {"model": "tiny"}, free_port()) as address:
        client = gradio_client.Client(address, verbose=False, max_workers=60, download_files=False)
        with studio._lock:  # the first of them takes long
            jobs = [client.submit(*arguments(seed=seed), api_name="/draw") for seed in range(50)]
            end = time.monotonic() + 20
            while len(refused := [job for job in jobs if job.done()]) < 46 and time.monotonic() < end:
                time.sleep(0.02)
        assert all("Queue is full" in str(job.exception()) for job in refused)
        drawn = [job for job in jobs if job not in refused]
        assert [len(job.result(timeout=20)) for job in drawn] == [8] * 4


def test_other_hosts_and_origins_are_refused(address: str) -> None:
    host = address.removeprefix("http://")

    def status(method: str, path: str, **headers: str) -> int:
        connection = HTTPConnection(host, timeout=10)
        connection.request(method, path, headers=headers)
        return connection.getresponse().status

    for path in ("/", "/config", "/gradio_api/info"):
        assert status("GET", path) == 200
        assert status("GET", path, Host=f"localhost:{host.split(':')[1]}") == 200
        assert status("GET", path, Host="evil.example") == 403
        assert status("GET", path, Host="127.0.0.1.evil.example") == 403
        assert status("GET", path, Origin="http://evil.example") == 403
    assert status("POST", "/gradio_api/queue/join", Origin="http://127.0.0.1:1") == 403
    assert not is_own("127.0.0.1:7860", "null")
    assert is_own("127.0.0.1:7860", "http://127.0.0.1:7860")


def test_files_of_this_machine_are_not_served(address: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    for path in (
        str(secret),
        "/etc/passwd",
        "../../../etc/passwd",
        f"{Path.cwd()}/pyproject.toml",
        "file:///etc/passwd",
    ):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/proxy=", "/static/", "/assets/"):
            connection = HTTPConnection(address.removeprefix("http://"), timeout=10)
            connection.request("GET", f"{route}{path}")
            answer = connection.getresponse()
            assert answer.status >= 400, path
            assert b"a secret" not in answer.read()


def test_it_listens_on_loopback_alone(address: str) -> None:
    port = int(address.rsplit(":", 1)[1])
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line]
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening


# --- in a browser ----------------------------------------------------------------------------------


@pytest.fixture
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_in_a_browser(browser: Any, address: str) -> None:
    """A prompt, three stages, a LoRA, and an image's settings back; no stranger's HTML, and no other host."""

    def find(selector: str, text: str = "") -> Any:
        end = time.monotonic() + 20
        while not (found := [one for one in browser.find_elements("css selector", selector) if text in one.text]):
            assert time.monotonic() < end, f"no {selector} {text}"
            time.sleep(0.02)
        return found[0]

    def value(name: str) -> str:
        return str(find(f"#{name} input, #{name} textarea").get_attribute("value"))

    def draw(images: int) -> None:
        find("#draw:not([disabled])").click()
        find(f"#history .gallery-item:nth-of-type({images})")
        find("#draw:not([disabled])")

    browser.get(address)
    find("#draw").click()
    find(".toast-body", "the prompt is empty")
    find("#prompt textarea").send_keys(f"a red cat {HARMFUL}")
    draw(1)
    assert all(find(f"#stage{number} img") for number in (1, 2, 3))
    first = {name: value(name) for name in ("prompt", "seed", "steps1", "guidance3")}
    find("#lora1 input").click()
    find("#prompt textarea").send_keys(" on a house")
    draw(2)
    assert value("seed") != first["seed"]  # a random one
    find("#history .gallery-item:nth-of-type(2) button").click()
    end = time.monotonic() + 5
    while value("prompt") != first["prompt"] and time.monotonic() < end:
        time.sleep(0.02)
    assert {name: value(name) for name in first} == first
    assert not find("#lora1 input").is_selected()
    assert not find("#random input").is_selected()
    assert browser.title != "harmed"
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 10
    assert [url for url in urls if not url.startswith((f"{address}/", "data:", "blob:"))] == []


# --- the command -----------------------------------------------------------------------------------


def test_a_port_in_use_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "model", "--port", str(port)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: port {port} can't be used (Address already in use): give another one by --port"
    with pytest.raises(ValueError, match="port 70000 can't be used"):
        check_port(70_000)


def test_what_is_no_nami_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class FluxPipeline: ...

    monkeypatch.setattr("nami_lightning.runs.load.load_pipeline", lambda *_: FluxPipeline())
    assert main(["serve", "flux", "--port", str(free_port())]) == 2
    assert "error: flux is a FluxPipeline; lightning serve takes only a NAMI" in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'nami_lightning\[serve\]'"):
        import_gradio()
