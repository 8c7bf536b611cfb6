"""A run for reports: two members, held-out images on disk, and every name hostile; evaluations of it."""

from html.parser import HTMLParser

import numpy as np
import pandas as pd
from helpers import heldout, make_frame, noisy_logits, write_member, write_stacker
from pictures import noise

from ensemble.core import artifacts
from ensemble.stacking.stacker import Stacker

SCRIPT = "<script>alert(1)</script>"
MEMBERS = ("one", "two_x")
STACKER = Stacker(MEMBERS, (0.9, 0.4), 0.1)
VOID = {"meta", "img", "br", "input", "link"}


def make_run(run):
    """48 held-out images in 12 groups; the first of each kind has a name that would break a careless page."""
    frame = make_frame()
    own = frame["split"] == "heldout"
    frame["root"] = str(run / "images")
    frame["path"] = [f"{number}.png" for number in range(len(frame))]
    frame["source"] = np.where(frame["group"].str[-1].isin(["0", "1"]), '"><img src=x onerror=alert(1)>', "camera")
    frame["generator"] = np.where(frame["label"] == 1, "$\\frac{1}$", "none")
    frame.loc[frame.index[own][:3], "id"] = [SCRIPT, "$x$", "' onload='alert(1)"]
    for number in np.flatnonzero(own):
        (run / "images").mkdir(parents=True, exist_ok=True)
        noise(number, 40, 36).save(run / "images" / frame.loc[number, "path"])
    artifacts.write_parquet(artifacts.dataset_path(run), frame)
    for seed, name in enumerate(MEMBERS):
        write_member(run, name, frame, noisy_logits(frame, 2 - seed, seed))
    write_stacker(run, STACKER)
    return heldout(frame)


def write_evaluation(run, name, rows, cells=("clean",), label=None):
    """An evaluation of the held-out rows in which each cell is noisier than the one before."""
    rows = rows if label is None else rows[rows["label"] == label]
    rng = np.random.default_rng(5)
    parts = []
    for number, cell in enumerate(cells):
        logits = (2 * rows["label"].to_numpy() - 1)[:, None] + rng.normal(0, 1 + 2 * number, (len(rows), 2))
        columns = {f"logit:{member}": logits[:, i].astype(np.float32) for i, member in enumerate(MEMBERS)}
        kept = rows[["id", "path", "root", "label", "group", "source", "generator"]]
        parts.append(kept.assign(cell=cell, logit=STACKER.logit(logits), **columns))
    scores = pd.concat(parts, ignore_index=True)
    artifacts.write_parquet(run / "evaluations" / name / "scores.parquet", scores)
    artifacts.write_json(run / "evaluations" / name / "evaluation.json", {"data": "photos.csv"})
    return scores


class Page(HTMLParser):
    """A page as a reader sees it: tags with attributes, tables by class as rows of cells, cards, and all text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.tables, self.cards, self.text = [], [], [], ""
        self.open = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append((attributes.get("class"), []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")
        elif tag == "article":
            self.cards.append((attributes["class"], []))
        elif tag == "small":
            self.handle_data(" ")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][1][-1][-1] += data
        elif "article" in self.open and data.strip():
            self.cards[-1][1].append(data.strip())

    def table(self, name, number=0):
        rows = [rows for own, rows in self.tables if own == name][number]
        return {row[0]: row[1:] for row in rows}

    def of(self, tag):
        return [attributes for own, attributes in self.tags if own == tag]


def problems(html):
    """What a self-contained page must not hold."""
    page = Page(html)
    found = [f"tag {tag}" for tag in ("script", "iframe", "i", "link", "object", "base") if page.of(tag)]
    for tag, attributes in page.tags:
        found += [f"{tag} {name}" for name in attributes if name.startswith("on")]
        if tag == "img":
            found += [] if attributes["src"].startswith("data:image/") and attributes["alt"] else ["picture"]
        found += [] if attributes.get("href", "#").startswith("#") else ["link out"]
    return found + [word for word in ("http:", "https:", "url(", "@import") if word in html]
