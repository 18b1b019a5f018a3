"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const other = { s: "t", t: "s" };
  const tensors = { s: data.source, t: data.target };
  const trees = {};

  // One tree: its rows in order, which of them are open, and where each one stands among those that are shown.
  for (const side of ["s", "t"]) {
    const chunks = [...by("tree-" + side).children];
    const rows = chunks.flatMap((chunk) => [...chunk.children]);
    const level = rows.map((row) => Number(row.getAttribute("aria-level")));
    const parent = [], end = [], above = [], row_of = [];
    rows.forEach((row, i) => {
      while (above.length && level[above[above.length - 1]] >= level[i]) end[above.pop()] = i;
      parent[i] = above.length ? above[above.length - 1] : -1;
      above.push(i);
      row.at = i;
      row.side = side;
      if (row.dataset.i !== undefined) row_of[Number(row.dataset.i)] = i;
    });
    while (above.length) end[above.pop()] = rows.length;
    trees[side] = {
      side, chunks, rows, parent, end, row_of, pane: by("pane-" + side),
      group: rows.map((row) => row.hasAttribute("aria-expanded")),
      open: rows.map((row) => row.getAttribute("aria-expanded") === "true"),
      shown: [], place: [], stand: [], current: -1,
    };
  }

  let high = 28;
  let lines = [];
  let chosen = null;
  let waiting = false;
  const svg = by("lines");

  function measure() {
    const first = trees.t.rows[0] || trees.s.rows[0];
    if (first) high = first.getBoundingClientRect().height || high;
  }

  // Show what is open, and nothing else; only what changes is touched.
  function lay_out(tree) {
    const shown = [];
    const n = tree.rows.length;
    for (let i = 0; i < n;) {
      tree.place[i] = shown.length;
      tree.stand[i] = i;
      shown.push(i);
      if (tree.group[i] && !tree.open[i]) {
        for (let k = i + 1; k < tree.end[i]; k++) { tree.place[k] = -1; tree.stand[k] = i; }
        i = tree.end[i];
      } else i++;
    }
    for (let i = 0; i < n; i++) {
      const hide = tree.place[i] < 0;
      if (tree.rows[i].hidden !== hide) tree.rows[i].hidden = hide;
      if (tree.group[i]) {
        const said = String(tree.open[i]);
        if (tree.rows[i].getAttribute("aria-expanded") !== said) tree.rows[i].setAttribute("aria-expanded", said);
      }
    }
    // A chunk out of sight is not rendered, so that it has to be told how high it is.
    for (const chunk of tree.chunks) {
      let count = 0;
      for (const row of chunk.children) if (!row.hidden) count++;
      chunk.hidden = !count;
      chunk.style.containIntrinsicHeight = count * high + "px";
    }
    tree.shown = shown;
    if (tree.current < 0 || tree.place[tree.current] < 0) roam(tree, tree.current < 0 ? shown[0] : tree.stand[tree.current]);
  }

  // Lines between what is shown: those of closed groups lie on one another, so that they are one.
  function join() {
    const found = new Map();
    data.target.forEach((tensor, i) => {
      const b = trees.t.stand[trees.t.row_of[i]];
      for (const from of tensor.from) {
        const a = trees.s.stand[trees.s.row_of[from]];
        const key = a + " " + b + " " + tensor.status;
        if (!found.has(key)) found.set(key, { a, b, status: tensor.status });
      }
    });
    lines = [...found.values()];
    later();
  }

  function later() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  }

  function draw() {
    const wide = svg.parentNode.clientWidth;
    if (!wide) return;
    const tall = trees.s.pane.clientHeight;
    svg.setAttribute("height", tall);
    const y = (tree, i) => tree.place[i] * high + high / 2 - tree.pane.scrollTop;
    const out = [];
    for (const line of lines) {
      let a = y(trees.s, line.a), b = y(trees.t, line.b);
      const far_a = a < 0 || a > tall, far_b = b < 0 || b > tall;
      if (far_a && far_b) continue;
      a = Math.max(-4, Math.min(tall + 4, a));
      b = Math.max(-4, Math.min(tall + 4, b));
      const end = chosen && (chosen.side === "s" ? line.a : line.b);
      const on = chosen && end >= chosen.row && end < chosen.until;
      out.push({ d: `M0 ${a} C${wide / 2} ${a} ${wide / 2} ${b} ${wide} ${b}`,
        c: line.status + (on ? " on" : chosen ? " dim" : far_a || far_b ? " away" : "") });
    }
    while (svg.childNodes.length > out.length) svg.lastChild.remove();
    while (svg.childNodes.length < out.length) svg.append(document.createElementNS("http://www.w3.org/2000/svg", "path"));
    out.forEach((line, i) => {
      const path = svg.childNodes[i];
      path.setAttribute("d", line.d);
      path.setAttribute("class", line.c);
    });
  }

  function roam(tree, i) {
    if (tree.current >= 0) tree.rows[tree.current].tabIndex = -1;
    tree.current = i === undefined ? -1 : i;
    if (tree.current >= 0) tree.rows[tree.current].tabIndex = 0;
  }

  function in_view(tree, i, at) {
    const top = tree.place[i] * high, pane = tree.pane;
    if (at !== undefined) pane.scrollTop = top - at;
    else if (top < pane.scrollTop) pane.scrollTop = top;
    else if (top + high > pane.scrollTop + pane.clientHeight) pane.scrollTop = top + high - pane.clientHeight;
  }

  function go(tree, i) {
    roam(tree, i);
    in_view(tree, i);
    tree.rows[i].focus({ preventScroll: true });
    choose(tree, i);
  }

  function set_open(tree, i, open) {
    tree.open[i] = open;
    lay_out(tree);
    join();
  }

  // What belongs to a row on the other side: of a tensor its own, of a group that of all in it.
  function counterparts(tree, i) {
    const found = new Set();
    const until = tree.group[i] ? tree.end[i] : i + 1;
    for (let k = i; k < until; k++) {
      const number = tree.rows[k].dataset.i;
      if (number === undefined) continue;
      const tensor = tensors[tree.side][Number(number)];
      for (const n of tree.side === "s" ? tensor.to : tensor.from) found.add(n);
    }
    return [...found].map((n) => trees[other[tree.side]].row_of[n]);
  }

  function choose(tree, i) {
    for (const row of document.querySelectorAll(".row.near, .row[aria-selected]")) {
      row.classList.remove("near");
      row.removeAttribute("aria-selected");
    }
    tree.rows[i].setAttribute("aria-selected", "true");
    const there = trees[other[tree.side]];
    const near = [...new Set(counterparts(tree, i).map((k) => there.stand[k]))];
    for (const k of near) there.rows[k].classList.add("near");
    const tops = near.map((k) => there.place[k] * high - there.pane.scrollTop);
    if (near.length && !tops.some((top) => top >= 0 && top + high <= there.pane.clientHeight))
      in_view(there, near[0], tree.place[i] * high - tree.pane.scrollTop);
    chosen = { side: tree.side, row: i, until: tree.group[i] ? tree.end[i] : i + 1 };
    tell(tree, i);
    later();
  }

  const make = (tag, text, kind) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };

  function tell(tree, i) {
    const row = tree.rows[i], box = by("detail");
    box.replaceChildren();
    box.classList.add("chosen");
    const title = make("h4");
    const list = make("dl");
    const add = (word, what) => { if (what && what.length) { const dd = make("dd"); dd.append(...[what].flat()); list.append(make("dt", word), dd); } };
    const links = (side, numbers) => {
      const shown = numbers.slice(0, 12).map((n) => {
        const button = make("button", tensors[side][n].name, "ref");
        button.type = "button";
        button.addEventListener("click", () => reveal(side, n));
        return button;
      });
      return numbers.length > 12 ? [...shown, "and " + (numbers.length - 12) + " more"] : shown;
    };
    if (tree.group[i]) {
      title.append(make("span", row.dataset.path, "ref"));
      add("holds", row.getAttribute("aria-label").slice(row.dataset.path.length + 2));
      const there = trees[other[tree.side]];
      add(tree.side === "t" ? "from" : "became", links(there.side, counterparts(tree, i).map((k) => Number(there.rows[k].dataset.i))));
      box.append(title, list);
      return;
    }
    const tensor = tensors[tree.side][Number(row.dataset.i)];
    title.append(make("span", tensor.name, "ref"), " ", make("span", data.signs[tensor.status] + " " + tensor.status, "badge " + tensor.status));
    add("type", tensor.type);
    if (tree.side === "t") {
      add("made of", tensor.expr ? make("code", tensor.expr) : "");
      add("kind", tensor.kind);
      add("from", links("s", tensor.from));
      add("why", tensor.evidence);
      add("note", tensor.note);
      add("refuted", tensor.not.join("; "));
    } else {
      add("became", links("t", tensor.to));
      add("note", tensor.note);
    }
    box.append(title, list);
  }

  function reveal(side, number) {
    const tree = trees[side], i = tree.row_of[number];
    for (let up = tree.parent[i]; up >= 0; up = tree.parent[up]) tree.open[up] = true;
    lay_out(tree);
    join();
    go(tree, i);
    tree.pane.scrollIntoView({ block: "nearest" });
    by("detail").scrollIntoView({ block: "nearest" });
  }

  function key(event) {
    const row = event.target.closest(".row");
    if (!row || event.ctrlKey || event.metaKey || event.altKey) return;
    const tree = trees[row.side], i = row.at, place = tree.place[i];
    const step = (to) => { if (to >= 0 && to < tree.shown.length) go(tree, tree.shown[to]); };
    const page = Math.max(1, Math.floor(tree.pane.clientHeight / high) - 1);
    if (event.key === "ArrowDown") step(place + 1);
    else if (event.key === "ArrowUp") step(place - 1);
    else if (event.key === "PageDown") step(Math.min(tree.shown.length - 1, place + page));
    else if (event.key === "PageUp") step(Math.max(0, place - page));
    else if (event.key === "Home") step(0);
    else if (event.key === "End") step(tree.shown.length - 1);
    else if (event.key === "ArrowRight") {
      if (tree.group[i] && !tree.open[i]) set_open(tree, i, true);
      else if (tree.group[i]) step(place + 1);
    } else if (event.key === "ArrowLeft") {
      if (tree.group[i] && tree.open[i]) set_open(tree, i, false);
      else if (tree.parent[i] >= 0) go(tree, tree.parent[i]);
    } else if (event.key === "Enter" || event.key === " ") {
      if (tree.group[i]) set_open(tree, i, !tree.open[i]);
      else {
        const there = other[tree.side], [first] = counterparts(tree, i);
        if (first !== undefined) reveal(there, Number(trees[there].rows[first].dataset.i));
      }
    } else return;
    event.preventDefault();
  }

  measure();
  for (const tree of Object.values(trees)) {
    const box = by("tree-" + tree.side);
    box.addEventListener("keydown", key);
    box.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (!row) return;
      if (tree.group[row.at]) set_open(tree, row.at, !tree.open[row.at]);
      go(tree, row.at);
    });
    tree.pane.addEventListener("scroll", later, { passive: true });
    lay_out(tree);
  }

  function all(open) {
    for (const tree of Object.values(trees)) {
      tree.group.forEach((group, i) => { if (group) tree.open[i] = open; });
      lay_out(tree);
    }
    join();
  }
  by("open-all").addEventListener("click", () => all(true));
  by("close-all").addEventListener("click", () => all(false));

  const names = ["t", "s"].flatMap((side) => tensors[side].map((tensor, i) => ({ side, i, name: tensor.name, low: tensor.name.toLowerCase() })));
  const MOST = 50;
  const search = by("search"), hits = by("hits");
  function find() {
    const word = search.value.trim().toLowerCase();
    hits.replaceChildren();
    hits.hidden = !word;
    if (!word) { by("found").textContent = ""; return []; }
    const rank = (found) => (found.low === word ? 0 : found.low.startsWith(word) || found.low.endsWith(word) ? 1 : 2);
    const found = names.filter((each) => each.low.includes(word)).sort((a, b) => rank(a) - rank(b));
    for (const each of found.slice(0, MOST)) {
      const tensor = tensors[each.side][each.i];
      const item = make("li"), button = make("button");
      button.type = "button";
      button.append(make("span", each.side === "s" ? "source" : "target", "type"), make("span", each.name, "name"),
        make("span", data.signs[tensor.status] + " " + tensor.status, "badge " + tensor.status));
      button.addEventListener("click", () => { search.value = ""; find(); reveal(each.side, each.i); });
      item.append(button);
      hits.append(item);
    }
    by("found").textContent = found.length + " of " + names.length + " tensors" + (found.length > MOST ? "; the first " + MOST + " are shown" : "");
    return found;
  }
  search.addEventListener("input", find);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { search.value = ""; find(); }
    if (event.key !== "Enter") return;
    const [first] = find();
    if (first) { search.value = ""; find(); reveal(first.side, first.i); }
  });

  for (const link of document.querySelectorAll("a[data-module]")) {
    link.addEventListener("click", (event) => {
      const tree = trees.t, path = link.dataset.module;
      let i = tree.rows.findIndex((row) => row.dataset.path === path);
      if (i < 0) i = tree.rows.findIndex((row) => row.dataset.path && row.dataset.path.startsWith(path + "."));
      if (i < 0) return;
      event.preventDefault();
      tree.open[i] = true;
      for (let up = tree.parent[i]; up >= 0; up = tree.parent[up]) tree.open[up] = true;
      lay_out(tree);
      join();
      go(tree, i);
      tree.pane.scrollIntoView({ block: "nearest" });
      by("detail").scrollIntoView({ block: "nearest" });
    });
  }

  join();
  window.addEventListener("resize", () => {
    const before = high;
    measure();
    if (high !== before) Object.values(trees).forEach(lay_out);
    later();
  });
  const parted = document.querySelector(".row.parted");
  if (parted && !parted.hidden) in_view(trees.t, parted.at, 2 * high);
})();
