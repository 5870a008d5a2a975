// The page of `mshare web`: asks for what there is, again and again, and shows it.
// Texts go in as text, and never as markup; the Content-Security-Policy holds us to that.

const SVG = "http://www.w3.org/2000/svg";
const POINTS = 900; // as watching.py
const SHOWN_OBJECTS = 200;
const UNITS = ["K", "M", "G", "T", "P", "E"];
const PATIENCE = 30_000; // for an answer of mshare web itself (milliseconds)

const $ = (id) => document.getElementById(id);
const points = [];
let last = null; // the last look
let chosen = location.hash.slice(1); // the id of the region that is shown

// -- figures --

/** Bytes for people, as `mshare ls` has them: 8.1M, and 512G if it is exact. */
function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  if (bytes < 1024) return String(bytes);
  let value = bytes;
  let unit = -1;
  do {
    value /= 1024;
    unit += 1;
  } while (value >= 1023.5 && unit < UNITS.length - 1);
  return value.toFixed(Number.isInteger(value) || value >= 99.95 ? 0 : 1) + UNITS[unit];
}

const rate = (value) => (value === null || value === undefined ? "–" : value.toFixed(0));
const megabytes = (value) => (value === null || value === undefined ? "–" : (value / 1e6).toFixed(1));
const address = (value) => (value === null ? "–" : "0x" + value.toString(16));
const or = (value) => value ?? "–";

// -- tables: rows stay the elements that they are, so that focus and selection stay, too --

class Table {
  constructor(element, columns, key, decorate = () => {}) {
    this.columns = columns;
    this.key = key;
    this.decorate = decorate;
    this.rows = new Map();
    this.items = [];
    this.order = null;
    const head = element.createTHead().insertRow();
    this.body = element.createTBody();
    this.heads = columns.map((column) => {
      const cell = document.createElement("th");
      cell.className = column.kind ?? "";
      cell.scope = "col";
      if (column.by) {
        const button = document.createElement("button");
        button.textContent = column.title;
        button.addEventListener("click", () => this.sort(column));
        cell.append(button);
      } else {
        cell.textContent = column.title;
      }
      head.append(cell);
      return cell;
    });
  }

  /** By this column; once more: the other way round. */
  sort(column) {
    const down = this.order?.column === column ? !this.order.down : Boolean(column.figure);
    this.order = { column, down };
    this.heads.forEach((cell, at) => {
      if (this.columns[at] === column) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    this.show(this.items);
  }

  show(items) {
    this.items = items;
    let sorted = items;
    if (this.order) {
      const { by } = this.order.column;
      const sign = this.order.down ? -1 : 1;
      const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
      sorted = [...items].sort((a, b) => sign * compare(by(a), by(b)));
    }
    const rows = new Map();
    for (const item of sorted) {
      const key = this.key(item);
      const row = this.rows.get(key) ?? this.make(key);
      this.columns.forEach((column, at) => {
        const text = String(column.text(item));
        const place = row.cells[at].firstElementChild ?? row.cells[at];
        if (place.textContent !== text) place.textContent = text;
      });
      this.decorate(row, item);
      rows.set(key, row);
    }
    this.rows = rows;
    const wanted = [...rows.values()];
    const there = [...this.body.rows];
    if (wanted.length !== there.length || wanted.some((row, at) => row !== there[at])) {
      this.body.replaceChildren(...wanted);
    }
  }

  make(key) {
    const row = document.createElement("tr");
    for (const column of this.columns) {
      const cell = row.insertCell();
      cell.className = column.kind ?? "";
      cell.dataset.column = column.title;
      if (column.link) {
        const link = document.createElement("a");
        link.href = "#" + key;
        link.dir = "auto";
        cell.append(link);
      }
    }
    return row;
  }
}

const regions = new Table(
  $("regions"),
  [
    {
      title: "Name", kind: "name", link: true, by: (r) => r.label,
      text: (r) => r.label + (r.removed ? " (removed)" : ""),
    },
    { title: "Memory", kind: "right", figure: true, by: (r) => r.memory, text: (r) => size(r.memory) },
    { title: "Sharers", kind: "right", figure: true, by: (r) => r.sharers ?? -1, text: (r) => or(r.sharers) },
    {
      title: "Faults/s", kind: "right", figure: true,
      by: (r) => r.faults_per_second ?? -1, text: (r) => rate(r.faults_per_second),
    },
    {
      title: "MB/s", kind: "right low", figure: true,
      by: (r) => r.populated_per_second ?? -1, text: (r) => megabytes(r.populated_per_second),
    },
    { title: "Saved", kind: "right", figure: true, by: (r) => r.saved ?? -1, text: (r) => size(r.saved) },
    { title: "Size", kind: "right low", figure: true, by: (r) => r.size ?? -1, text: (r) => size(r.size) },
    { title: "Address", kind: "right code low", by: (r) => r.start ?? Infinity, text: (r) => address(r.start) },
    { title: "Backing", kind: "low", text: (r) => or(r.backing).split(" ", 1)[0] },
    { title: "Owner", kind: "low", by: (r) => r.owner, text: (r) => r.owner },
    { title: "Mode", kind: "code low", text: (r) => r.mode },
  ],
  (region) => region.id,
  (row, region) => {
    row.dataset.id = region.id;
    row.classList.toggle("chosen", region.id === chosen);
    row.classList.toggle("removed", region.removed);
  },
);
regions.sort(regions.columns[1]);

const sharers = new Table(
  $("sharers"),
  [
    { title: "Process", by: (s) => s.pid, text: (s) => s.pid },
    { title: "Command", kind: "name", by: (s) => s.label, text: (s) => s.label },
    { title: "RSS", kind: "right", figure: true, by: (s) => s.rss ?? -1, text: (s) => size(s.rss) },
    {
      title: "Page tables", kind: "right", figure: true,
      by: (s) => s.tables ?? -1, text: (s) => size(s.tables),
    },
    { title: "User", kind: "low", by: (s) => s.user, text: (s) => s.user },
    { title: "Access", kind: "low", text: (s) => s.access },
    { title: "Since", kind: "low", by: (s) => s.since, text: (s) => s.since },
  ],
  (sharer) => sharer.pid + " " + sharer.since,
);

const objects = new Table(
  $("objects"),
  [
    { title: "Start", kind: "code", text: (o) => address(o.start) },
    { title: "Size", kind: "right", text: (o) => size(o.end - o.start) },
    { title: "Protection", kind: "code", text: (o) => o.permissions },
    { title: "Object", kind: "name", text: (o) => o.label },
    { title: "Offset", kind: "right low", text: (o) => size(o.offset) },
  ],
  (object) => object.start,
);

// -- charts --

class Chart {
  /** Lines of the points' figures `keys`, one scale for all; the first has its area filled. */
  constructor(name, keys, format) {
    this.keys = keys;
    this.format = format;
    const figure = document.querySelector(`[data-chart=${name}]`);
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 1000 100");
    svg.setAttribute("preserveAspectRatio", "none");
    const add = (kind, style) => {
      const element = document.createElementNS(SVG, kind);
      if (style) element.setAttribute("class", style);
      svg.append(element);
      return element;
    };
    for (const y of ["0", "100"]) {
      const line = add("line");
      for (const [at, value] of [["x1", "0"], ["x2", "1000"], ["y1", y], ["y2", y]]) line.setAttribute(at, value);
    }
    this.area = add("path", `area ${Object.keys(keys)[0]}`);
    this.lines = Object.keys(keys).map((style) => add("path", `line ${style}`));
    const axis = document.createElement("div");
    axis.className = "axis";
    this.from = document.createElement("span");
    this.most = document.createElement("span");
    axis.append(this.from, this.most);
    figure.append(svg, axis);
  }

  show() {
    const begin = points[0]?.time ?? 0;
    const span = Math.max((points.at(-1)?.time ?? 0) - begin, 1);
    const keys = Object.values(this.keys);
    const top = Math.max(...points.flatMap((point) => keys.map((key) => point[key] ?? 0)), 1e-9);
    const x = (point) => (((point.time - begin) / span) * 1000).toFixed(1);
    keys.forEach((key, at) => {
      let line = "";
      let area = "";
      let open = null; // the x at which a stretch without a gap has begun
      let end = null;
      const close = () => {
        if (open !== null) area += `L${end} 100L${open} 100Z`;
        open = null;
      };
      for (const point of points) {
        if (point[key] === null) {
          close();
          continue;
        }
        const place = `${x(point)} ${(100 - (point[key] / top) * 96).toFixed(2)}`;
        line += (open === null ? "M" : "L") + place;
        area += (open === null ? "M" : "L") + place;
        open ??= x(point);
        end = x(point);
      }
      close();
      this.lines[at].setAttribute("d", line);
      if (at === 0) this.area.setAttribute("d", area);
    });
    const seconds = Date.now() / 1000 - begin;
    const ago = seconds < 90 ? `${seconds.toFixed(0)} s` : `${(seconds / 60).toFixed(0)} min`;
    this.from.textContent = points.length ? `${ago} ago` : "";
    this.most.textContent = points.length ? `at most ${this.format(top < 1e-6 ? 0 : top)}` : "";
  }
}

const charts = [
  new Chart("tables", { saved: "saved", tables: "tables" }, size),
  new Chart("faults", { faults: "faults_per_second" }, rate),
  new Chart("populated", { populated: "populated_per_second" }, megabytes),
];

// -- one region --

let shownObjects = ""; // for which id, and what

function showRegion() {
  const region = last?.regions.find((each) => each.id === chosen);
  $("region").hidden = !region;
  if (!region) return;
  $("name").textContent = region.label;
  const facts = [
    `${size(region.memory)} of ${size(region.size)}`,
    region.backing,
    region.page && `pages of ${size(region.page)}`,
    `${region.owner}, ${region.mode}`,
    region.access,
    region.state,
    region.objects === 1 ? "1 object" : region.objects !== undefined && `${region.objects} objects`,
  ];
  $("facts").textContent = facts.filter(Boolean).join(" · ");
  $("start").textContent = region.size ? address(region.start) : "";
  $("end").textContent = region.size ? address(region.start + region.size) : "";
  const here = last.processes.filter((each) => each.id === chosen);
  sharers.show(here);
  $("nobody").hidden = here.length > 0;
  $("nobody").textContent =
    region.sharers === undefined || region.sharers === null
      ? "Its mode does not let you see who has it attached."
      : "Nobody has it attached.";
}

function kind(permissions) {
  if (permissions.includes("x")) return "exec";
  if (permissions.includes("w")) return "write";
  return permissions.includes("r") ? "read" : "none";
}

function showObjects({ maps, count }) {
  const region = last.regions.find((each) => each.id === chosen);
  objects.show((maps ?? []).slice(0, SHOWN_OBJECTS));
  $("more").textContent =
    maps === null
      ? "Its mode does not let you see what is mapped."
      : count === 0
        ? "Nothing is mapped in it."
        : count > SHOWN_OBJECTS
          ? `And ${count - SHOWN_OBJECTS} more: mshare maps shows all.`
          : "";
  const bars = [];
  for (const object of region?.size ? (maps ?? []) : []) {
    const bar = document.createElementNS(SVG, "rect");
    bar.setAttribute("class", kind(object.permissions));
    bar.setAttribute("x", ((object.start - region.start) / region.size) * 1000);
    // What is there is seen, however small.
    bar.setAttribute("width", Math.max(((object.end - object.start) / region.size) * 1000, 1));
    bar.setAttribute("height", "10");
    const title = document.createElementNS(SVG, "title");
    title.textContent = `${object.permissions} ${address(object.start)} ${size(object.end - object.start)} ${object.label}`;
    bar.append(title);
    bars.push(bar);
  }
  $("map").replaceChildren(...bars);
}

async function ask(path) {
  const reply = await fetch(path, { signal: AbortSignal.timeout(PATIENCE), cache: "no-store" });
  return { ok: reply.ok, status: reply.status, text: await reply.text() };
}

async function refreshObjects() {
  const id = chosen;
  if (!last?.regions.some((each) => each.id === id)) return;
  const reply = await ask(`api/regions/${id}/objects`);
  if (id !== chosen) return; // another one was chosen meanwhile
  const key = `${id} ${reply.text}`;
  if (reply.ok && shownObjects !== key) {
    shownObjects = key;
    showObjects(JSON.parse(reply.text));
  }
}

async function measure() {
  const id = chosen;
  if (!$("measured").open || !id) return;
  $("pagetables").textContent = "The daemon is measuring…";
  try {
    const reply = await ask(`api/regions/${id}/pagetables`);
    if (id !== chosen) return;
    const text = reply.ok ? JSON.parse(reply.text).text : reply.text;
    $("pagetables").textContent = text ?? "Its mode does not let you see that.";
  } catch (failure) {
    $("pagetables").textContent = failure.message;
  }
}

// -- everything --

function show() {
  const total = {
    regions: last.regions.length,
    sharers: last.processes.length,
    memory: size(last.memory),
    saved: size(last.saved),
    faults: rate(last.faults_per_second),
    populated: megabytes(last.populated_per_second),
  };
  for (const [name, value] of Object.entries(total)) {
    document.querySelector(`[data-total=${name}]`).textContent = value;
  }
  $("root").textContent = last.root;
  const { version, pid } = last.daemon;
  $("daemon").textContent = pid ? `msharefsd ${version}, process ${pid}` : "";
  const wanted = $("filter").value.toLowerCase();
  regions.show(last.regions.filter((each) => each.label.toLowerCase().includes(wanted)));
  $("none").hidden = last.regions.length > 0;
  for (const chart of charts) chart.show();
  showRegion();
}

function trouble(text) {
  document.body.classList.toggle("stale", Boolean(text));
  $("trouble").hidden = !text;
  if ($("trouble").textContent !== text) $("trouble").textContent = text;
}

async function refresh() {
  let reply;
  try {
    reply = await ask(`api/state?after=${points.at(-1)?.number ?? 0}`);
  } catch {
    trouble("mshare web does not answer: it may have ended.");
    $("fresh").textContent = "not live";
    return 2;
  }
  if (!reply.ok) {
    trouble(reply.text);
    $("fresh").textContent = "not live";
    return 2;
  }
  const state = JSON.parse(reply.text);
  points.push(...state.points);
  points.splice(0, Math.max(points.length - POINTS, 0));
  last = state.last ?? last;
  trouble(state.trouble ?? "");
  $("fresh").textContent =
    state.age === null ? "waiting" : state.trouble ? `as it was ${state.age.toFixed(0)} s ago` : "live";
  if (last) show();
  if (last && !state.trouble) await refreshObjects().catch(() => {});
  // The first look is soon there; after that as often as there is something new.
  return state.last || state.trouble ? state.interval : 0.2;
}

async function run() {
  for (;;) {
    const seconds = await refresh();
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
  }
}

$("filter").addEventListener("input", () => last && show());
$("measured").addEventListener("toggle", measure);
addEventListener("hashchange", () => {
  chosen = location.hash.slice(1);
  $("measured").open = false;
  objects.show([]);
  $("map").replaceChildren();
  $("more").textContent = "";
  shownObjects = "";
  if (last) {
    show();
    refreshObjects().catch(() => {});
    if (!$("region").hidden) $("region").scrollIntoView({ block: "nearest" });
  }
});
run();
