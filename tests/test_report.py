"""The report: its numbers are the run's, its episodes the policy's and the PRM's, it asks nothing of the network, and a browser shows it."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from common import generator, key, read_model
from env import NOTHING_HAPPENS
from figures import KINDS, figures_of, pi
from games import generated_split, split_dev
from play import told
from prm import score
from report import main as report_main
from report import read_run
from rollout import rollout
from tiny import assert_refused, command, games, in_process, played, taught, tokenizer
from tree import propose

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """A page's elements as (tag, attributes, text), tables as rows of texts; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.rows, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append((tag, self.elements[-1]))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        if self.open:
            self.open[-1][1][2] += text
            if {"td", "th"} & {tag for tag, _ in self.open}:
                self.rows[-1][-1] += text


@pytest.fixture(scope="module")
def reported(run, tmp_path_factory):
    """A report of the finished tiny run: the run's folder, the report's, the page's text, its episodes, what was printed."""
    out = tmp_path_factory.mktemp("report")
    done = command("report.py", run[0], "--out", out, "--episodes", 5)
    assert done.returncode == 0, done.stderr
    text = (out / "index.html").read_text()
    return run[0], out, text, episodes_of(text), done.stdout


def episodes_of(text):
    return json.loads(next(e[2] for e in Page(text).elements if e[1].get("id") == "data"))


def read(file):
    return json.loads(file.read_text())


# --- numbers ---------------------------------------------------------------------------------------------------------------------

def test_the_tables_hold_the_numbers_of_the_run(reported):
    folder, _, text, _, _ = reported
    rows = {row[0]: row[1:] for row in Page(text).rows}
    result = read(folder / "result.json")
    for row in result["rows"]:
        for split in ("dev", "valid_seen"):
            success, interval, gain, actions, inadmissible = rows[f"{pi(row['iteration'])}, {split}"]
            of = row[split]
            assert (success, actions, inadmissible) == (f"{100 * of['success']:.1f} %", f"{of['mean_actions']:.1f}", f"{100 * of['inadmissible']:.1f} %")
            low, high = map(float, interval.split(" … "))
            assert low <= 100 * of["success"] + 0.05 and high >= 100 * of["success"] - 0.05
            mean, low, high = (100 * g for g in of["gain_over_0"])
            assert gain == (f"{mean:+.1f} ({low:+.1f} … {high:+.1f})" if row["iteration"] else "–")
    for i in (1, 2):
        card = read(folder / f"iter{i}/prm.json")["held_out"]
        assert rows[pi(i, "Q")][2:4] == [f"{card['excess_bce']:.3f}", f"{card['ece']:.3f}"]
        for q, G, n in card["calibration"]:
            assert f"{pi(i, 'Q')}: mean Q {q:.3f}, mean return {G:.3f}, {n:,} actions" in text
    assert rows["AgentPRM π₃"][0] == "88.1 %" and rows["GPT-4o"][0] == "64.9 %" and rows["InversePRM, two iterations"][0] == "86.6 %"
    published = [float(row[1][:-2]) for row in Page(text).rows[list(rows).index("who"):] if re.fullmatch(r"\d+\.\d %", row[1]) and len(row) == 3]
    assert published == sorted(published, reverse=True) and len(published) == 16 + 3  # theirs, and ours on the test split
    assert "best policy, chosen on dev" in text and f"<b>{pi(result['best'])}</b>" in text


def test_every_stage_of_every_iteration_has_its_time_and_type_its_success(reported):
    folder, _, text, _, _ = reported
    seconds = read(folder / "state.json")["seconds"]
    assert f"π₁, DPO: {seconds['iter1/dpo'] / 60:.1f} min" in text and f"π₀, SFT: {seconds['iter0/sft'] / 60:.1f} min" in text
    assert f"{sum(seconds.values()) / 60:.0f} min" in text
    cost = read(folder / "state.json")
    dpo = [name for name in seconds if name.endswith("/dpo")]
    assert ["DPO", f"{sum(seconds[name] for name in dpo) / 60:.1f}", f"{sum(cost['core_seconds'][name] for name in dpo) / 3600:.2f}",
            f"{max(cost['peak_mb'][name] for name in dpo) / 1000:.2f}"] in Page(text).rows
    assert ["all", f"{sum(seconds.values()) / 60:.1f}"] in [row[:2] for row in Page(text).rows]
    for i in range(3):
        for kind, part in read(folder / f"iter{i}/eval-valid_seen.json")["by_task"].items():
            assert f"{KINDS[kind]} ({part['games']} games), {pi(i)}: {100 * part['success']:.1f} %" in text


def test_success_on_the_way_is_drawn_where_it_was_tracked(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    record = read(folder / "iter2/dpo.json")
    record["log"][0] |= {"true/success": 0.4321, "prm/q": 0.875}
    (folder / "iter2/dpo.json").write_text(json.dumps(record))
    assert in_process(report_main, (folder, "--episodes", 0), monkeypatch, capsys).returncode == 0
    step = read(folder / "iter1/dpo.json")["log"][-1]["step"] + record["log"][0]["step"]
    text = (folder / "report/index.html").read_text()
    assert f"at update {step} 43.2 % of dev are won" in text
    assert f"Q₂ of what is played on dev: 0.875 at update {step}" in text and "Q₁ of proposals" in text and "Q₂ of proposals" not in text


def test_every_figure_is_a_png_too(reported):
    _, out, text, _, printed = reported
    names = re.findall(r'<figure id="([\w-]+)"', text)
    assert names == ["success", "tasks-dev", "tasks-valid_seen", "calibration", "score-and-success", "visits", "time"]
    pytest.importorskip("matplotlib")
    assert "7 figures" in printed and {file.stem for file in out.glob("*.png")} == set(names)
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000 for file in out.glob("*.png"))


# --- episodes --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("best, judge", ((0, 1), (1, 1), (2, 2)))
def test_episodes_are_the_best_policys_with_q_of_its_prm(run, best, judge, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    for i in range(3):
        record = read(folder / f"iter{i}/eval-dev.json")
        (folder / f"iter{i}/eval-dev.json").write_text(json.dumps({**record, "success": float(i == best)}))
    assert in_process(report_main, (folder, "--episodes", 5), monkeypatch, capsys).returncode == 0
    episodes, flags = episodes_of((folder / "report/index.html").read_text()), read(folder / "config.json")["flags"]
    policy, words = read_model(folder / f"iter{best}/policy")
    prm, _ = read_model(folder / f"iter{judge}/prm", head="score")
    dev = split_dev(generated_split("train", flags["n_generated"]), flags["dev_games"])[1]
    picked = [dev[g] for g in generator(0, "report").permutation(len(dev))[:5]]
    assert [e["game"] for e in episodes] == [game.id for game in picked]
    trajectories = {t.game: t for t in rollout(policy, words, [(game, 0) for game in picked], temperature=0.3, seed=0, max_steps=8)}
    for e, game in zip(episodes, picked):
        t = trajectories[game.id]
        q = 1 / (1 + np.exp(-score(prm, [t])[0]))
        assert [s["q"] for s in e["steps"]] == pytest.approx(q, abs=1e-4) and e["won"] == t.won and e["type"] == KINDS[game.task_type]
        assert e["steps"][0]["progress"] is None and [s["progress"] for s in e["steps"][1:]] == pytest.approx(np.diff(q), abs=1e-4)
        assert [s["action"] for s in e["steps"]] == [words.decode(t.ids[a:b]).strip() for a, b in t.spans]
        assert [s["inadmissible"] for s in e["steps"]] == t.inadmissible.tolist() == [s["answer"] == NOTHING_HAPPENS for s in e["steps"]]
        answers = [words.decode(t.ids[b:a]) for (_, b), (a, _) in zip(t.spans, t.spans[1:])]
        assert [words.decode(words.encode(s["answer"])) for s in e["steps"][:-1]] == answers


@torch.no_grad()
def test_other_proposals_are_the_policys_with_q_at_that_state():
    prm = taught().with_score_head().eval()
    torch.nn.init.normal_(prm.score.weight, generator=torch.Generator().manual_seed(0))
    t = max(played(), key=len)
    game = next(game for game in games() if game.id == t.game)
    episode = told(game, t, taught(), tokenizer(), 1.0, 3, prm, 1 / (1 + np.exp(-score(prm, [t])[0])))
    drawn = propose(taught(), [t.ids.astype(np.int64)], [(0, start) for start in t.spans[:, 0]], 8, 1.0, (3, key(t.game), np.arange(len(t))))
    for k, (step, (start, _), proposals) in enumerate(zip(episode["steps"], t.spans, drawn)):
        ids_of = {tokenizer().decode(ids).strip(): ids for ids, _ in proposals[::-1]}  # a text can be sampled as several rows of tokens: the first counts
        others = {other["action"]: other for other in step["others"]}
        assert {step["action"], *others} == {step["action"], *ids_of} and step["action"] not in others
        assert step["times"] + sum(other["times"] for other in step["others"]) == 8
        assert [other["q"] for other in step["others"]] == sorted((other["q"] for other in step["others"]), reverse=True)
        for action, other in others.items():
            instead = replace(t, ids=np.array([*t.ids[:start], *ids_of[action]]), spans=np.array([*t.spans[:k], (start, start + len(ids_of[action]))]))
            assert other["q"] == pytest.approx(1 / (1 + np.exp(-score(prm, [instead])[0][-1])), abs=2e-4)
    assert sum(len(step["others"]) for step in episode["steps"]) > 10


# --- what is asked for, and of whom -----------------------------------------------------------------------------------------------

def test_the_page_asks_for_nothing(reported):
    _, _, text, _, _ = reported
    page = Page(text)
    for tag, attributes, inside in page.elements:
        links = {name: value for name, value in attributes.items() if name in ("src", "srcset", "href", "data", "action", "poster", "xlink:href")}
        assert all(value.startswith("#") or tag == "a" and value.startswith("https://arxiv.org/abs/") for value in links.values()), (tag, links)
        assert not (tag == "style" and re.search(r"url\(|@import", inside)) and tag not in ("link", "img", "iframe", "object", "embed")
    policy = next(a["content"] for _, a, _ in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and not re.search(r"https?:", policy)
    assert not re.search(r"<!--\w+-->", text)


def test_a_run_on_its_way_is_reported_as_far_as_it_goes_and_without_models(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    for path in [*folder.glob("iter2/eval-*"), folder / "iter1/eval-valid_seen.json", folder / "result.json"]:
        path.unlink()
    for path in [*folder.glob("iter*/policy"), *folder.glob("iter*/prm"), folder / "best"]:
        shutil.rmtree(path)
    assert in_process(report_main, (folder, "--episodes", 0), monkeypatch, capsys).returncode == 0
    text = (folder / "report/index.html").read_text()
    names = [row[0] for row in Page(text).rows]
    assert {"π₀, dev", "π₁, dev", "π₀, valid_seen", "Q₂"} <= set(names) and not {"π₂, dev", "π₁, valid_seen"} & set(names)
    assert episodes_of(text) == []


def test_without_matplotlib_the_page_is_written_all_the_same(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = in_process(report_main, (run[0], "--episodes", 0, "--out", tmp_path), monkeypatch, capsys)
    assert done.returncode == 0 and "pip install matplotlib" in done.stdout and len(done.stdout.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]


def test_best_of_n_is_drawn_where_it_was_measured(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    row = {"policy": 0, "prm": 1, "over": "actions", "episodes": [{"game": str(g), "won": g > 4} for g in range(10)]}
    rows = [{**row, "n": 4, "success": 0.5}, {**row, "prm": None, "n": 1, "success": 0.25}, {**row, "n": 4, "over": "episodes", "success": 0.7}]
    (folder / "curves-dev.json").write_text(json.dumps({"split": "dev", "temperature": 0.3, "rows": rows}))
    assert in_process(report_main, (folder, "--episodes", 0), monkeypatch, capsys).returncode == 0
    text = (folder / "report/index.html").read_text()
    (folder / "curves-hot.json").write_text(json.dumps({"split": "dev", "temperature": 1.0, "rows": rows[:1]}))
    assert text.index("π₀ by Q₁, actions, dev: best of 1 wins 25.0 %") < text.index("π₀ by Q₁, actions, dev: best of 4 wins 50.0 %")
    assert "π₀ by Q₁, episodes, dev: best of 4 wins 70.0 %" in text and "episodes, dev: best of 1 wins" not in text and re.findall('<figure id="(best-of-n.*?)"', text) == ["best-of-n-actions-dev-0.3", "best-of-n-episodes-dev-0.3"]
    assert re.search(r"best of 4 wins 50.0 % \(\d+\.\d … \d+\.\d\)", text)
    assert in_process(report_main, (folder, "--episodes", 0), monkeypatch, capsys).returncode == 0
    assert '<figure id="best-of-n-actions-dev-1"' in (folder / "report/index.html").read_text()


def test_sft_alone_is_drawn_where_its_curve_is_named(run, tmp_path, monkeypatch, capsys):
    rows = [{"demos": n, "split": "valid_seen", "success": p} for n, p in ((2000, 0.75), (50, 0.125))]
    (tmp_path / "curve.json").write_text(json.dumps(rows))
    assert in_process(report_main, (run[0], "--episodes", 0, "--sft-curve", tmp_path, "--out", tmp_path), monkeypatch, capsys).returncode == 0
    text = (tmp_path / "index.html").read_text()
    of_run = {i: read(run[0] / f"iter{i}/eval-valid_seen.json")["success"] for i in range(3)}
    figure = text[text.index('<figure id="demonstrations"'):]
    figure = figure[:figure.index("</figure>")]
    said = re.findall("<li>(.*?)</li>", figure[figure.index("<details>"):])
    assert said == ["SFT on 50 demonstrations: 12.5 %", f"SFT on 64 demonstrations: {100 * of_run[0]:.1f} %",  # π_0
                    "SFT on 2,000 demonstrations: 75.0 %", *(f"{pi(i)}: {100 * p:.1f} %" for i, p in of_run.items())]
    assert len(set(re.findall(r'class="c1" cx="([\d.]+)"', figure))) == 1  # the run's policies stand over its own number of demonstrations
    assert figure.count('"c1 dashes"') == 1


def test_a_run_with_relative_prms_is_reported_without_what_they_cannot_say(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    for file in folder.glob("iter*/prm.json"):
        file.write_text(json.dumps(read(file) | {"held_out": {"pair_accuracy": 0.5, "pairs": 4}}))
    for file in folder.glob("iter*/dpo.json"):
        file.write_text(json.dumps(read(file) | {"log": [line | {"score/mean": 21.0} for line in read(file)["log"]]}))  # f, which is no Q
    for file in folder.glob("iter*/prm/config.json"):
        file.write_text(json.dumps(read(file) | {"head": "relative"}))
    (folder / "state.json").write_text(json.dumps({"seconds": {**read(folder / "state.json")["seconds"], "iter1/prm2": 60.0, "iter0/value": 60.0}}))
    done = in_process(report_main, (folder, "--episodes", 3), monkeypatch, capsys)
    text = (folder / "report/index.html").read_text()
    assert done.returncode == 0 and "bt" in done.stderr and '<figure id="calibration"' not in text and '<figure id="success"' in text and "score-and-success" not in text


def test_of_a_run_that_has_not_improved_no_gain_is_told(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    (folder / "iter0/eval-dev.json").write_text(json.dumps(read(folder / "iter0/eval-dev.json") | {"success": 1.0}))
    (folder / "iter1-old").mkdir()
    shutil.copy(folder / "iter1/eval-dev.json", folder / "iter1-old")  # somebody's backup
    assert in_process(report_main, (folder, "--episodes", 0), monkeypatch, capsys).returncode == 0
    tiles = (folder / "report/index.html").read_text().partition('<ul class="tiles">')[2].partition("</ul>")[0]
    assert "<b>π₀</b> best policy" in tiles and "100.0 %</b> on dev<" in tiles and "points over" not in tiles


def test_all_that_is_drawn_lies_within_its_axes(reported):
    figures = figures_of(read_run(reported[0]))
    assert len(figures) >= 7
    for figure in figures:
        (_, left, right, _), (_, low, high, _) = figure["x"], figure["y"]
        for _, _, points, text in figure["marks"]:
            assert all(left <= x <= right and low <= y <= high for x, y in points), (figure["name"], text)


def test_generated_games_are_not_told_as_alfworlds(reported):
    text = reported[2]
    assert "Generated games, not ALFWorld's" in text and "generated games, not alfworld's: nothing here is to be compared" in text and "A scripted expert" not in text


@pytest.mark.parametrize("flags, parts", (
    (("/nowhere",), ("/nowhere", "config.json")),
    (("{unevaluated}",), ("not evaluated",)),
    (("{run}", "--split", "valid_unseen"), ("--split valid_unseen", "dev, valid_seen")),
    (("{run}", "--sft-curve", "{run}"), ("--sft-curve", "curve.json")),
    (("{run}", "--sft-curve", "{of_train}"), ("--sft-curve", "train", "dev, valid_seen")),
    (("{begun}", "--sft-curve", "{begun}"), ("--sft-curve", "--init somewhere")),
    (("{run}", "--episodes", -1), ("--episodes",)),
    (("{run}", "--seed", -1), ("--seed",)),
    (("{run}", "--device", "tpu9"), ("tpu9",)),
    (("{run}", "--out", "{run}/config.json/x"), ("config.json",)),
    (("{moved}",), ("other games", "--data")),
    (("{unmodelled}",), ("no model there",)),
    (("{run}", "--episode", 3), ("--episode",)),
))
def test_mistakes_are_told_in_one_line(run, flags, parts, tmp_path, monkeypatch, capsys):
    copies = {name: tmp_path / name for name in ("unevaluated", "moved", "unmodelled", "of_train", "begun") if f"{{{name}}}" in flags}
    for folder in copies.values():
        shutil.copytree(run[0], folder)
    if "unevaluated" in copies:
        (copies["unevaluated"] / "iter1/eval-dev.json").unlink()
    if "moved" in copies:
        (copies["moved"] / "data.json").write_text(json.dumps({"train": "3,553 games of train from somewhere"}))
    for name in {"of_train", "begun"} & copies.keys():
        (copies[name] / "curve.json").write_text(json.dumps([{"demos": 50, "split": "train" if name == "of_train" else "dev", "success": 0.5}]))
    if "begun" in copies:
        config = read(run[0] / "config.json")
        (copies["begun"] / "config.json").write_text(json.dumps(config | {"flags": config["flags"] | {"init": "somewhere"}}))
    if "unmodelled" in copies:
        shutil.rmtree(next(copies["unmodelled"].glob(f"iter{read(run[0] / 'result.json')['best']}/policy")))
    words = [str(flag).format(run=run[0], **copies) for flag in flags]
    words += ["--out", tmp_path / "out"] * ("--out" not in words)
    assert_refused(in_process(report_main, words, monkeypatch, capsys), *parts)


# --- a browser -------------------------------------------------------------------------------------------------------------------

DRIVER = """
<script>
const told = {errors: [], views: {}};
window.addEventListener("error", event => told.errors.push(event.message));
const tasks = () => [...document.querySelectorAll("#list button")].map(b => b.textContent);
const view = () => ({list: tasks(), task: document.querySelector("#episode h3")?.textContent, count: document.getElementById("count").textContent,
  steps: [...document.querySelectorAll("#episode .steps > li")].map(li => li.querySelector("code").textContent + " " + li.querySelector(".numbers b").textContent)});
for (const type of document.getElementById("type").options) for (const won of document.getElementById("won").options) {
  for (const option of [type, won]) { option.selected = true; option.parentNode.dispatchEvent(new Event("change")); }
  told.views[type.value + " " + won.value] = view();
}
for (const name of ["type", "won"]) { document.getElementById(name).value = ""; document.getElementById(name).dispatchEvent(new Event("change")); }
document.querySelectorAll("#list button")[1].click();
told.clicked = view();
document.activeElement.blur();
document.getElementById("next").focus();
document.getElementById("next").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
told.right = view();
document.getElementById("previous").click();
told.back = view();
document.getElementById("open").click();
told.closed = document.querySelectorAll(".others:not([open])").length;
told.hash = location.hash;
document.getElementById("won").value = "lost"; document.getElementById("won").dispatchEvent(new Event("change"));
told.lost = location.hash;
told.wide = document.documentElement.scrollWidth <= innerWidth;
told.fetched = performance.getEntriesByType("resource").length;
document.body.replaceChildren(Object.assign(document.createElement("pre"), {id: "told", textContent: JSON.stringify(told)}));
</script>
"""


def browse(text, folder, width=500):
    """Open a page in Chromium. -> (its elements after the scripts ran, what it asked the network for, what the console said)"""
    (folder / "page.html").write_text(text)
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900",
                           "--virtual-time-budget=5000", f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}", "--dump-dom",
                           f"file://{folder / 'page.html'}"], capture_output=True, text=True, timeout=120)
    log = (folder / "net.json").read_text().splitlines()  # an event a line; Chromium's own errands are not of a file:// page
    asked = {url for line in log if '"network_isolation_key":"file:' in line for url in re.findall(r'"url":"((?!file:)[^"]*)"', line)}
    return {e[1].get("id"): e for e in Page(done.stdout).elements}, asked, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_the_browser_would_tell(tmp_path):
    page = '<body><img src="http://127.0.0.1:9/picture"><script>fetch("http://127.0.0.1:9/data").catch(() => 0); console.log("word")</script></body>'
    _, asked, said = browse(page, tmp_path)
    assert asked == {"http://127.0.0.1:9/picture", "http://127.0.0.1:9/data"} and any('"word"' in line for line in said)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
@pytest.mark.parametrize("width", (500, 1280))
def test_a_browser_shows_and_filters_it_and_asks_for_nothing(reported, width, tmp_path):
    _, _, text, episodes, _ = reported
    elements, asked, said = browse(text.replace("</body>", DRIVER + "</body>"), tmp_path, width)
    assert asked == set() and said == []
    seen = json.loads(elements["told"][2])
    assert seen["errors"] == [] and seen["fetched"] == 0 and seen["wide"] and seen["closed"] == 0
    for name, view in seen["views"].items():
        kind, won = name.split(" ")
        expected = [e for e in episodes if kind in ("", e["type"]) and won in ("", "won" if e["won"] else "lost")]
        assert view["list"] == ["✗✓"[e["won"]] + e["task"] for e in expected]
        assert view["count"].startswith(f"{len(expected)} episode") and view["count"].endswith(f", {sum(e['won'] for e in expected)} won")
    steps = lambda e: [f"{s['action'] or '(nothing)'} {s['q']:.2f}" for s in e["steps"]]
    for name, n in (("clicked", 1), ("right", 2), ("back", 1)):
        assert seen[name]["task"] == episodes[n]["task"]
        assert [s[:-1] for s in seen[name]["steps"]] == [s[:-1] for s in steps(episodes[n])]  # the last digit may be rounded otherwise
    assert seen["hash"] == "#episode=1&type=&won=" and seen["lost"].endswith("&won=lost")
