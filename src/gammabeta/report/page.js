// The page's behavior. Texts from run folders reach the document only as text (textContent,
// setAttribute), never as markup; what goes to Plotly, which reads tags, is escaped first.
(async function () {
  "use strict";
  const root = document.documentElement;
  const all = (selector, base = document) => Array.from(base.querySelectorAll(selector));
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  let noFigures = "There is nothing to draw here.";
  const FIGURES = await figuresOfPage();
  const view = viewOf(location, history);

  // --- numbers ---------------------------------------------------------------------------
  const shown = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value !== "number" || Number.isInteger(value)) return String(value);
    return String(Number(value.toPrecision(5)));
  };

  const stepper = stepperOf({ make, view });
  const own = figuresOf({ root, make, view, shown, stepper });
  const records = recordFigures({ ...own, make, stepper, view });
  const DRAW = { ...own.draw, ...records.draw }; // kind of figure -> function that draws it

  // --- tables of data --------------------------------------------------------------------
  const csvField = (value) => {
    if (value === null || value === undefined) return "";
    let text = String(value);
    // A spreadsheet would run a text that begins like a formula.
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = "'" + text;
    return /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  };

  function download(name, data) {
    const lines = [data.names, ...rowsOf(data, 0, data.rows)];
    const text = lines.map((line) => line.map(csvField).join(",")).join("\r\n") + "\r\n";
    const url = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    make("a", { href: url, download: name + ".csv" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  function* rowsOf(data, from, to) {
    for (let row = from; row < to; row += 1) yield data.values.map((column) => column[row]);
  }

  function showTable(host, name, data) {
    const CHUNK = 200;
    const body = make("tbody");
    const head = make("tr", {}, ...data.names.map((text) => make("th", { scope: "col" }, text)));
    const table = make("table", { class: "data" }, make("thead", {}, head), body);
    const region = { class: "scroll", role: "region", tabindex: "0", "aria-label": "Data: " + name };
    const count = make("span", { role: "status" });
    const more = make("button", { type: "button", class: "quiet" });
    const csv = make("button", { type: "button", class: "quiet csv" }, "Download CSV");
    let done = 0;
    const grow = () => {
      const next = Math.min(done + CHUNK, data.rows);
      for (const row of rowsOf(data, done, next)) {
        body.append(make("tr", {}, ...row.map((value) => make("td", {}, shown(value)))));
      }
      done = next;
      count.textContent = `${done} of ${data.rows} rows`;
      more.textContent = `Show ${Math.min(CHUNK, data.rows - done)} more`;
      more.hidden = done >= data.rows;
    };
    more.addEventListener("click", grow);
    csv.addEventListener("click", () => download(name, data));
    grow();
    host.append(make("div", { class: "tools" }, csv, count), make("div", region, table), more);
  }

  async function figuresOfPage() {
    const plain = document.getElementById("figures");
    if (plain) return JSON.parse(plain.textContent);
    try {
      return await unpack("figures-packed");
    } catch (error) {
      noFigures = error.message;
      return [];
    }
  }

  async function unpack(id) {
    if (typeof DecompressionStream === "undefined") {
      throw new Error("This browser cannot unpack the numbers; one made after 2023 can.");
    }
    const packed = atob(document.getElementById(id).textContent.trim());
    const bytes = Uint8Array.from(packed, (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  // Of all rows the numbers behind a verdict: one for each of its parts and each seed.
  function bySeed(host, data) {
    const { cells, budget, before } = host.dataset;
    const wanted = JSON.parse(cells);
    const column = Object.fromEntries(data.names.map((text, at) => [text, data.values[at]]));
    const rows = Array.from({ length: data.rows }, (_, row) => row).filter((row) =>
      column.kind[row] === "value" && column.budget[row] === budget &&
      column.seed[row] < Number(before) && wanted.includes(column.cell[row]));
    rows.sort((a, b) => wanted.indexOf(column.cell[a]) - wanted.indexOf(column.cell[b]) ||
      column.seed[a] - column.seed[b]);
    const names = ["cell", "seed", "value"];
    const values = names.map((text) => rows.map((row) => column[text][row]));
    return { names: ["part", "seed", "value"], rows: rows.length, values };
  }

  for (const host of all("details.table")) {
    host.addEventListener("toggle", async () => {
      if (!host.open || host.dataset.filled) return;
      host.dataset.filled = "yes";
      try {
        const figure = FIGURES[host.dataset.figureTable];
        if (figure) {
          const columns = own.data(figure) ?? records.data(figure);
          const own_ = figure.id.startsWith(figure.experiment);
          showTable(host, own_ ? figure.id : `${figure.experiment}-${figure.id}`, columns);
        } else if (document.getElementById(host.dataset.rows)) {
          const rows = await unpack(host.dataset.rows);
          showTable(host, host.dataset.name, host.dataset.cells ? bySeed(host, rows) : rows);
        }
      } catch (error) {
        host.append(make("p", { class: "empty" }, error.message));
      }
    });
  }

  // --- figures: drawn when they come near ---------------------------------------------------
  function draw(figureNode) {
    const figure = FIGURES[figureNode.dataset.figure];
    const host = figureNode.querySelector(".panels");
    const drawer = figure && Object.hasOwn(DRAW, figure.kind) ? DRAW[figure.kind] : null;
    if (!drawer || !figure.panels.length) {
      host.replaceChildren(make("p", { class: "empty" }, noFigures));
      return;
    }
    if (!host.children.length) {
      for (const panel of figure.panels) {
        const title = make("h4", {}, panel.title);
        host.append(make("div", { class: "panel" }, title, make("div", { class: "plot" })));
      }
    }
    drawer(host, figure);
    figureNode.dataset.drawn = "yes";
  }

  const figures = all("[data-figure]");
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "800px" });
  figures.forEach((node) => near.observe(node));
  // What is folded has no width to be drawn to: it waits until it is opened.
  const folded = (node) => node.closest("details.fold:not([open])") !== null;
  const redraw = () => figures.filter((node) => node.dataset.drawn).forEach((node) => {
    if (!folded(node)) { draw(node); return; }
    delete node.dataset.drawn;
    near.observe(node);
  });

  // --- theme -----------------------------------------------------------------------------
  const button = document.getElementById("theme");
  const THEMES = ["system", "light", "dark"];
  const name = () => root.dataset.theme ?? "system";
  const label = () => { button.textContent = "Theme: " + name(); };
  button.hidden = false;
  label();
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(name()) + 1) % THEMES.length];
    if (next === "system") delete root.dataset.theme;
    else root.dataset.theme = next;
    try {
      localStorage.setItem("gammabeta-theme", next);
    } catch {
      // Without storage the choice lasts as long as the page.
    }
    label();
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  const claims = claimList({ all, view });

  // --- what is open, and where on the page: kept in the address ----------------------------
  const foldable = all("details");
  const isOpen = foldable.map((node) => node.open); // as the page comes
  foldable.forEach((node) => node.addEventListener("toggle", () => {
    if (document.documentElement.dataset.printing) return;
    const turned = foldable.flatMap((each, at) => (each.open === isOpen[at] ? [] : [at]));
    view.set("turned", turned.join("."));
  }));

  function restoreOpen() {
    const turned = new Set((view.get("turned") ?? "").split(".").filter(Boolean).map(Number));
    foldable.forEach((node, at) => { node.open = turned.has(at) ? !isOpen[at] : isOpen[at]; });
  }

  // What is near is drawn first: it changes its height, and the place would move away.
  function drawNear(target) {
    const at = target.getBoundingClientRect().top;
    const beside = (node) => Math.abs(node.getBoundingClientRect().top - at) < 1800;
    figures.filter((node) => !node.dataset.drawn && !folded(node) && beside(node)).forEach(draw);
  }

  function reveal() {
    const target = view.anchor && document.getElementById(view.anchor);
    if (!target) return;
    target.hidden = false;
    const fold = target.querySelector(":scope > details");
    if (fold && target.matches(".claims > li, .experiment")) fold.open = true;
    for (let node = target.closest("details"); node; node = node.parentElement.closest("details")) {
      node.open = true;
    }
    drawNear(target);
    headed(target).scrollIntoView({ behavior: "instant" });
  }
  // The question of a card that is the first of its experiment stands as the experiment's title.
  const headed = (node) =>
    (node.querySelector(":scope > h3.repeat") ? node.closest(".experiment") : node);
  const top = (node) => headed(node).getBoundingClientRect().top;
  const passed = () => landmarks.filter((node) => !folded(node) && top(node) < 90).at(-1);

  // The way back leads to where the reader was: so far below what stood at the top.
  const here = () => {
    const node = passed();
    return { y: scrollY, ...(node ? { id: node.id, top: top(node) } : {}) };
  };
  function goBack({ y, id, top: was }) {
    const node = id && document.getElementById(id);
    for (let fold = node?.closest("details"); fold; fold = fold.parentElement.closest("details")) {
      fold.open = true;
    }
    window.scrollTo({ top: y, behavior: "instant" });
    if (!node) return;
    drawNear(node);
    window.scrollBy({ top: top(node) - was, behavior: "instant" });
  }
  history.scrollRestoration = "manual";
  document.addEventListener("click", (event) => {
    if (event.target.closest?.("a[href^='#']")) view.stay(here());
  }, true);

  function arrive() {
    view.followed();
    if (location.hash.includes("=")) restore();
    goThere();
  }
  const goThere = () => (view.place ? goBack(view.place) : reveal());
  let arrived = "";
  window.addEventListener("popstate", (event) => {
    if (!event.state?.place) return; // a link, of which `hashchange` will tell
    arrive();
    arrived = location.href; // two entries may have one address: then there is no hashchange
    setTimeout(() => { arrived = ""; }, 50);
  });
  window.addEventListener("hashchange", () => {
    if (arrived !== location.href) arrive();
  });

  function restore() {
    restoreOpen();
    claims?.restore();
    for (const node of figures) {
      node.querySelector(".controls")?.remove();
      node.querySelector(".views")?.replaceChildren();
    }
    redraw();
  }

  const landmarks = all("main > section[id], .experiment, .card[id], .figure[id]");
  let scrolled = 0;
  window.addEventListener("scroll", () => {
    clearTimeout(scrolled);
    scrolled = setTimeout(() => {
      view.moved(scrollY < 40 ? "" : (passed()?.id ?? ""));
      view.stay(here());
    }, 200);
  }, { passive: true });

  if (location.hash) {
    restoreOpen();
    goThere();
    // Once all is loaded the browser goes to the anchor by itself.
    if (document.readyState === "complete") setTimeout(goThere, 0);
    else window.addEventListener("load", () => setTimeout(goThere, 0));
  } else if (view.place) {
    goBack(view.place);
  }

  // --- printing ----------------------------------------------------------------------------
  let closedAgain = [];
  let theme = null;
  window.addEventListener("beforeprint", () => {
    if (root.dataset.printing) return;
    root.dataset.printing = "yes";
    theme = root.dataset.theme ?? null;
    root.dataset.theme = "light"; // paper is
    closedAgain = all(".fold, .card details:not(.table), details.block:not(.table)").filter((node) => !node.open);
    closedAgain.forEach((node) => { node.open = true; });
    figures.forEach(draw);
  });
  window.addEventListener("afterprint", () => {
    if (!root.dataset.printing) return;
    closedAgain.forEach((node) => { node.open = false; });
    if (theme === null) delete root.dataset.theme;
    else root.dataset.theme = theme;
    redraw();
    delete root.dataset.print;
    setTimeout(() => { delete root.dataset.printing; }, 0);
  });
  const printer = document.getElementById("print");
  if (printer) {
    printer.hidden = false;
    printer.addEventListener("click", () => {
      root.dataset.print = "claims";
      window.print();
    });
  }

  for (const copy of all(".copy")) {
    copy.addEventListener("click", async () => {
      const code = copy.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code); // no permission: at least it is selected
        copy.textContent = "Selected";
      }
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
  }
})();
