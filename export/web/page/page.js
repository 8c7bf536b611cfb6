// The page: images go to /api/score in small requests, one after the other. Whatever a file or the server says is set
// as text, never as markup.
"use strict";

const AT_ONCE = 8; // images in a request, so that answers appear as they come
const $ = (id) => document.getElementById(id);
const results = []; // answers of /api/score, in the order of the table
const waiting = []; // files not sent yet
let info = null;
let working = false;

function element(tag, kind, text) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}

const percent = (p) => (p === null ? "not run" : `${(100 * p).toFixed(1)} %`);
const say = (text) => { $("status").textContent = text; };

function memberRow(name, p) {
  const row = element("div", "member");
  const track = element("div", "track");
  const bar = element("div", "bar");
  bar.style.width = `${100 * (p ?? 0)}%`;
  track.append(bar);
  row.append(element("span", "", name), track, element("span", "", percent(p)));
  return row;
}

function thumbnail(file) {
  const image = element("img");
  image.alt = "";
  image.src = URL.createObjectURL(file);
  const done = () => URL.revokeObjectURL(image.src);
  image.addEventListener("load", done);
  image.addEventListener("error", () => { done(); image.remove(); }); // a format that browsers do not show
  return image;
}

// Opens and closes a row below the image's with its heat maps. They are asked for once, or again after an error.
function heatButton(file, row) {
  const button = element("button", "heat", "Heat map");
  button.type = "button";
  let maps = null;
  const open = (shown) => {
    maps.hidden = !shown;
    button.textContent = shown ? "Close heat map" : "Heat map";
    button.setAttribute("aria-expanded", String(shown));
  };
  button.addEventListener("click", async () => {
    if (maps && maps.isConnected) {
      open(maps.hidden);
      if (maps.hidden && maps.querySelector(".error")) maps.remove();
    } else if (button.textContent === "Heat map") {
      button.textContent = "Making it";
      const cell = element("td");
      cell.colSpan = 3;
      try {
        cell.append(...pictures(await post("api/explain", [file])));
      } catch (error) {
        cell.append(element("div", "error", error.message));
      }
      maps = element("tr", "maps");
      maps.append(cell);
      row.after(maps);
      open(true);
      if (!working) summary();
    }
  });
  return button;
}

function pictures({ members, note }) {
  const grid = element("div", "grid");
  for (const [name, { heat, logit, p }] of Object.entries(members)) {
    const figure = element("figure");
    const image = element("img");
    image.src = heat;
    image.alt = `Heat map of ${name}`;
    const caption = element("figcaption");
    caption.append(element("div", "", name), element("div", "", `${logit > 0 ? "AI-made" : "real"}, ${percent(p)}`));
    figure.append(image, caption);
    grid.append(figure);
  }
  return [grid, element("div", "note", note)];
}

function show(file, answer) {
  results.push(answer);
  const row = element("tr");
  const [picture, target, members] = [element("td"), element("td"), element("td")];
  picture.append(element("span", "name", answer.name));
  if (answer.error === null) {
    picture.prepend(thumbnail(file));
    if (info.explain) picture.append(heatButton(file, row));
    const call = answer.ai ? "AI-made" : "real";
    target.append(element("div", "target", percent(answer.target)), element("div", answer.ai ? "ai" : "real", call));
    for (const [name, p] of Object.entries(answer.members)) members.append(memberRow(name, p));
  } else {
    target.append(element("div", "error", "not scored"));
    members.append(element("div", "error", answer.error));
  }
  row.append(picture, target, members);
  $("results").tBodies[0].append(row);
  $("results").hidden = $("buttons").hidden = false;
}

const failed = (file, error) => show(file, { name: file.name, target: null, ai: null, members: {}, error });

// The next files that fit into one request. One too large by itself is told of, not sent.
function take() {
  const { images, megabytes } = info.limits;
  const taken = [];
  let bytes = 0;
  while (waiting.length && taken.length < Math.min(images, AT_ONCE)) {
    const size = waiting[0].size;
    if (size > 1e6 * megabytes) failed(waiting.shift(), `larger than ${megabytes} MB`);
    else if (bytes + size > 1e6 * megabytes) break;
    else { taken.push(waiting.shift()); bytes += size; }
  }
  return taken;
}

async function post(path, files) {
  const body = new FormData();
  for (const file of files) body.append("images", file, file.name);
  for (;;) {
    const response = await fetch(path, { method: "POST", body });
    if (response.ok) return response.json();
    const text = await response.text();
    if (response.status !== 503) throw new Error(text);
    say("The server is busy; waiting.");
    await new Promise((resume) => setTimeout(resume, 1000 * Number(response.headers.get("Retry-After") || 1)));
  }
}

async function work() {
  if (working || !info) return;
  working = $("clear").disabled = true;
  while (waiting.length) {
    const files = take();
    if (!files.length) continue;
    say(`Scoring ${files.length} of ${files.length + waiting.length} to go.`);
    try {
      const answers = (await post("api/score", files)).images;
      // the browser may have sent a name in other characters: the file's own is shown and saved
      files.forEach((file, place) => show(file, { ...answers[place], name: file.name }));
    } catch (error) {
      for (const file of files) failed(file, error.message);
    }
  }
  working = $("clear").disabled = false;
  summary();
}

function summary() {
  const unread = results.filter((answer) => answer.error !== null).length;
  say(results.length ? `${results.length - unread} scored${unread ? `, ${unread} not` : ""}.` : "");
}

function add(files) {
  waiting.push(...files);
  work();
}

// A cell that begins like a formula would be run by spreadsheets.
function cell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "string") return String(value);
  return `"${(/^[=+\-@\t\r\n]/.test(value) ? `'${value}` : value).replaceAll('"', '""')}"`;
}

function csv() {
  const rows = [["name", "target", "ai", ...info.members, "error"]];
  for (const { name, target, ai, members, error } of results) {
    rows.push([name, target, ai === null ? null : Number(ai), ...info.members.map((member) => members[member]), error]);
  }
  return rows.map((row) => row.map(cell).join(",") + "\r\n").join("");
}

function save() {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.download = "manyeyes.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function clear() {
  waiting.length = results.length = 0;
  $("results").tBodies[0].replaceChildren();
  $("results").hidden = $("buttons").hidden = true;
  say("");
  $("files").focus();
}

async function start() {
  $("files").addEventListener("change", () => { add($("files").files); $("files").value = ""; });
  $("save").addEventListener("click", save);
  $("clear").addEventListener("click", clear);
  document.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
  document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    add(event.dataTransfer.files);
  });
  const response = await fetch("api/info");
  if (!response.ok) throw new Error(await response.text());
  info = await response.json();
  const runs = info.members.map((name) => `${name} (${info.runs[name] ?? "not run"})`).join(", ");
  $("about").textContent = `An image counts as AI-made from P(ai) = ${percent(info.threshold)} on. Members: ${runs}, on ${info.device}` +
    `${info.cascade ? ", in a cascade" : ""}. Up to ${info.limits.megabytes} MB an image. manyeyes ${info.version}.`;
  work();
}

start().catch((error) => say(`The server cannot be reached: ${error.message}`));
