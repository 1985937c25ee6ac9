"""The report in a real browser: nothing on its console, nothing requested, nothing wider than a phone."""

import asyncio
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from matquant.report import JobResults, write_report
from matquant.report.summary import summarize

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


async def visit(port: str, page: Path, width: int) -> dict:
    """Open a page through the DevTools protocol; what it said, asked for, and how wide it is."""
    import aiohttp

    said, asked, answers = [], [], {}
    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as response:
            target = await response.json()
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            count = 0

            async def call(method: str, **params: object) -> dict:
                nonlocal count
                count += 1
                mine = count
                await socket.send_json({"id": mine, "method": method, "params": params})
                while mine not in answers:
                    message = json.loads((await asyncio.wait_for(socket.receive(), 30)).data)
                    if "id" in message:
                        answers[message["id"]] = message.get("result", message)
                    elif message["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                        said.append(message["params"])
                    elif message["method"] == "Network.requestWillBeSent":
                        asked.append(message["params"]["request"]["url"])
                return answers[mine]

            for domain in ("Network", "Log", "Runtime", "Page"):
                await call(f"{domain}.enable")
            await call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
            await call("Page.navigate", url=page.as_uri())
            script = "new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', done))"
            await call("Runtime.evaluate", expression=script, awaitPromise=True)
            measure = "[document.documentElement.scrollWidth, document.body.innerText, document.querySelectorAll('svg').length]"
            found = await call("Runtime.evaluate", expression=measure, returnByValue=True)
    wide, text, drawings = found["result"]["value"]
    return {"said": said, "asked": asked, "width": wide, "text": text, "drawings": drawings}


@pytest.fixture
def browse(tmp_path):
    profile = tmp_path / "profile"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    browser = subprocess.Popen(
        [BROWSER, *flags, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not (port := profile / "DevToolsActivePort").exists() or not port.read_text().strip():
            assert browser.poll() is None, "the browser ended at once"
            assert time.monotonic() < deadline, "the browser did not start"
            time.sleep(0.05)
        number = port.read_text().split()[0]
        yield lambda page, width: asyncio.run(visit(number, page, width))
    finally:
        browser.terminate()
        browser.wait(20)


def with_search(results: dict) -> dict:
    widths = {row["name"]: 2 + index % 3 for index, row in enumerate(results["layers"])}
    entry = next(e for e in results["slices"] if e["bits"] == "allocation")
    entry |= {"name": "allocation.yaml", "allocation": {"widths": widths, "predicted": 0.5, "measured": 0.4}}
    for e in (results["baseline"], *results["slices"]):
        e["tasks"] = {"arc_easy": {"acc": 0.5, "acc_stderr": 0.01}}
    entry["recovery"] = {"arc_easy/acc": 98.76}
    history = [
        {"budget": "2.5 bits", "generation": g, "loss": 0.5 / g, "evaluations": 16, "tokens": 4096, "skipped": 100}
        for g in range(1, 5)
    ]
    results["search"] = {
        "method": "hybrid",
        "fitness": "kl",
        "evaluations": 64,
        "tokens": 16384,
        "skipped": 400,
        "history": history,
        "evaluations_per_second": 12.5,
    }
    return results


@pytest.mark.parametrize("width", [390, 1280])
def test_a_report_opens_without_a_word_and_without_a_request(browse, make_results, tmp_path, width):
    page = write_report(JobResults.from_json(with_search(make_results(allocation=True))), tmp_path)
    found = browse(page, width)
    assert found["said"] == []
    assert [url for url in found["asked"] if not url.startswith(("file:", "data:"))] == []
    assert found["asked"][0] == page.as_uri()
    assert found["width"] <= width
    assert found["drawings"] >= 5
    for text in ("0.500 ± 0.010 (98.8 %)", "allocation.yaml", "400 proposals skipped", "python run.py method=matgptq"):
        assert text in found["text"]


def test_a_summary_opens_too(browse, make_results, tmp_path):
    for job, method in enumerate(("rtn", "matgptq")):
        folder = tmp_path / "sweep" / str(job)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(make_results(method, allocation=True)))
    summarize(tmp_path / "sweep")
    found = browse(tmp_path / "sweep" / "summary.html", 390)
    assert found["said"] == []
    assert all(url.startswith(("file:", "data:")) for url in found["asked"])
    assert found["width"] <= 390
    assert "matgptq" in found["text"]
