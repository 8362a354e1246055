"""A headless Chromium driven over a pipe, with real keys, mouse and finger, and what a report's tests ask of a page."""

import base64
import json
import os
import shlex
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

LIMIT_S = 120  # after which the browser is ended, so that no call waits for ever
KEYS = {"Tab": (9, ""), "Space": (32, " "), "Enter": (13, "\r")}

# Contrast (WCAG 2) of every visible text with what lies under it, by tag and class; "canvas": the bare page's colour.
CONTRAST = """(() => {
    const parse = text => [...text.matchAll(/[\\d.]+/g)].map(Number);
    const over = (top, under) => under.map((v, i) => top[i] * (top[3] ?? 1) + v * (1 - (top[3] ?? 1)));
    const probe = document.body.appendChild(document.createElement("div"));
    probe.style.background = "Canvas";
    const canvas = parse(getComputedStyle(probe).backgroundColor);
    probe.remove();
    const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const found = {}, walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
        const layers = [];
        for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
        const under = layers.reduceRight((below, layer) => over(layer, below), canvas);
        const text = light(over(parse(getComputedStyle(element).color), under)), ground = light(under);
        const ratio = (Math.max(text, ground) + .05) / (Math.min(text, ground) + .05);
        const name = element.tagName.toLowerCase() + (element.className ? "." + element.className : "");
        found[name] = Math.min(found[name] ?? 99, ratio);
    }
    return {found, canvas};
})()"""


class Browser:
    """Chromium with one page; each call returns when the browser has answered."""

    def __init__(self, profile: Path) -> None:
        self.messages: list[str] = []
        self._loaded = False
        self._number = 0
        there, self._commands = os.pipe()
        answers, back = os.pipe()
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        script = f"exec {shlex.join(command)} 3<&{there} 4>&{back} 2>/dev/null"
        self._process = subprocess.Popen(["bash", "-c", script], pass_fds=(there, back))
        os.close(there)
        os.close(back)
        self._limit = threading.Timer(LIMIT_S, self._process.kill)
        self._limit.daemon = True
        self._limit.start()
        self._answers = os.fdopen(answers, "rb")
        self._session = ""
        page = next(t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self._call("Emulation.setFocusEmulationEnabled", enabled=True)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._commands)  # the browser ends with its pipe
        self._answers.close()
        self._process.wait()
        self._limit.cancel()

    def open(self, page: Path, *, width: int, dark: bool) -> None:
        """Load a file as a screen of that width shows it; a narrow one is a phone's, with a finger for a mouse."""
        self.messages.clear()
        phone = width < 500
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone)
        self._call("Emulation.setTouchEmulationEnabled", enabled=phone)
        features = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        wanted = [{"name": name, "value": value} for name, value in features.items()]
        self._call("Emulation.setEmulatedMedia", features=wanted)
        self._loaded = False
        self._call("Page.navigate", url=page.as_uri())
        while not self._loaded:
            self._receive()

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release Tab, Space or Enter."""
        code, text = KEYS[key]
        named: dict[str, Any] = {"key": text if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
        self._call("Input.dispatchKeyEvent", type="keyUp", **named)

    def point(self, element: str, *, tap: bool = False) -> None:
        """Move the mouse onto the middle of what a JavaScript expression names, or tap it with a finger."""
        box = f"(e => (e.scrollIntoView({{block: 'center', inline: 'center'}}), e.getBoundingClientRect()))({element})"
        x, y = self.run(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        if tap:
            self._call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
            self._call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, (method, answer)
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser ended"
            data += byte
        message: dict[str, Any] = json.loads(data)
        if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.messages.append(json.dumps(message["params"]))
        self._loaded |= message.get("method") == "Page.loadEventFired"
        return message


def check_keys(browser: Browser) -> None:
    """By Tab from the top: each stop has a name and an outline; Space chooses a picture, Enter opens what is folded."""
    stop = "(e => e.matches('.blend input') ? e.parentElement : e)(document.activeElement)"
    for _ in range(60):
        browser.press("Tab")
        name = browser.run(f"{stop}.outerHTML.slice(0, 200)")
        assert browser.run(f"getComputedStyle({stop}).outlineStyle") != "none", name
        assert browser.run("(e => e.ariaLabel || e.innerText)(document.activeElement)")
        if browser.run("document.activeElement.matches('.blend input')"):
            break
    chosen = "document.querySelector('.blend input')"
    opacity = f"Number(getComputedStyle({chosen}.nextElementSibling).opacity)"
    assert browser.run(f"document.activeElement == {chosen}") and browser.run(opacity) < 0.5
    browser.press("Space")
    browser.press("Tab")
    assert browser.run(f"{chosen}.checked && document.activeElement != {chosen}") and browser.run(opacity) < 0.5
    browser.run(f"{chosen}.focus()")
    browser.press("Space")
    browser.press("Tab")
    assert browser.run(opacity) == 1
    for number in range(browser.run("document.querySelectorAll('details').length")):
        browser.run(f"document.querySelectorAll('summary')[{number}].focus()")
        browser.press("Enter")
    assert browser.run("[...document.querySelectorAll('details')].every(e => e.open)")


def check_blending(browser: Browser, *, tap: bool) -> None:
    """The image shines through a picture that the mouse is on, or that a finger chose."""
    last = "[...document.querySelectorAll('.blend')].at(-1)"
    opacity = f"Number(getComputedStyle({last}.lastElementChild).opacity)"
    assert browser.run(opacity) == 1
    assert browser.run(f"getComputedStyle({last}).backgroundImage").startswith("url(")
    browser.point(last, tap=tap)
    assert browser.run(opacity) < 0.5 and browser.run(f"{last}.firstElementChild.checked") == tap


def check_contrast(browser: Browser) -> list[int]:
    """WCAG's 4.5 to 1 for all text, on what lies under it; the page's own background, red, green and blue."""
    measured = browser.run(CONTRAST)
    found, styles = measured["found"], "p a h2 li caption td td.grey p.grey figcaption small pre"
    assert not set(styles.split()) - found.keys()
    assert not {name: ratio for name, ratio in found.items() if ratio < 4.5}
    background: list[int] = measured["canvas"]
    return background
