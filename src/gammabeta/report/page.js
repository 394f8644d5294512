// The page's behavior. Texts from run folders reach the document only as text (textContent,
// setAttribute), never as markup; what goes to Plotly, which reads tags, is escaped first.
(function () {
  "use strict";
  const root = document.documentElement;
  const all = (selector, base = document) => Array.from(base.querySelectorAll(selector));
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const FIGURES = JSON.parse(document.getElementById("figures").textContent);

  // --- numbers ---------------------------------------------------------------------------
  const shown = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value !== "number" || Number.isInteger(value)) return String(value);
    return String(Number(value.toPrecision(5)));
  };

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

  async function unpack(id) {
    if (typeof DecompressionStream === "undefined") {
      throw new Error("This browser cannot unpack the rows; one made after 2023 can.");
    }
    const packed = atob(document.getElementById(id).textContent.trim());
    const bytes = Uint8Array.from(packed, (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  function figureData(figure) {
    const names = ["panel", "series", "n", "x", "y", "lo", "hi"];
    const values = names.map(() => []);
    for (const panel of figure.panels) {
      for (const s of panel.series) {
        s.x.forEach((x, at) => {
          const row = [panel.title, s.name, s.n, x, s.y[at], s.lo?.[at], s.hi?.[at]];
          row.forEach((value, column) => values[column].push(value));
        });
      }
    }
    return { names, values, rows: values[0].length };
  }

  for (const host of all("details.table")) {
    host.addEventListener("toggle", async () => {
      if (!host.open || host.dataset.filled) return;
      host.dataset.filled = "yes";
      try {
        const figure = FIGURES[host.dataset.figureTable];
        if (figure) {
          const columns = figure.kind === "curves" ? figureData(figure) : records.data(figure);
          showTable(host, `${figure.experiment}-${figure.id}`, columns);
        } else if (document.getElementById(host.dataset.rows)) {
          showTable(host, host.dataset.name, await unpack(host.dataset.rows));
        }
      } catch (error) {
        host.append(make("p", { class: "empty" }, error.message));
      }
    });
  }

  // --- figures ---------------------------------------------------------------------------
  // Color, dash and marker by style: no curve is told by its color alone.
  const KNOWN = {
    bn: { color: "--curve-bn", dash: "solid", symbol: "circle" },
    none: { color: "--curve-none", dash: "7px,4px", symbol: "circle-open" },
    brn: { color: "--curve-2", dash: "2px,3px", symbol: "square-open" },
    // numbers of others beside our curves: marks without a line
    "bn-points": { color: "--curve-bn", points: true, symbol: "diamond" },
    "none-points": { color: "--curve-none", points: true, symbol: "diamond-open" },
    "brn-points": { color: "--curve-2", points: true, symbol: "square" },
  };
  const OTHERS = [
    { color: "--curve-2", dash: "2px,3px", symbol: "square-open" },
    { color: "--curve-3", dash: "9px,3px,2px,3px", symbol: "diamond-open" },
    { color: "--curve-4", dash: "12px,4px", symbol: "triangle-up-open" },
    { color: "--curve-5", dash: "4px,2px", symbol: "x-thin-open" },
  ];
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const plain = (text) => text.replace(/[&<>"']/g, (char) => `&#${char.charCodeAt(0)};`);
  const faint = (hex) => hex + "2e"; // the band: the curve's color at 18 %

  function stylesOf(figure) {
    const found = new Map(); // style and name -> look
    let others = 0;
    for (const panel of figure.panels) {
      for (const s of panel.series) {
        const key = s.style + "\n" + s.name;
        if (found.has(key)) continue;
        const taken = Array.from(found.values()).some((entry) => entry.style === s.style);
        const known = Object.hasOwn(KNOWN, s.style) && !taken ? KNOWN[s.style] : null;
        const look = known ?? OTHERS[others++ % OTHERS.length];
        found.set(key, { ...look, style: s.style, name: s.name });
      }
    }
    return found;
  }

  function drawLegend(host, looks) {
    host.replaceChildren();
    for (const look of looks.values()) {
      const dash = (look.dash ?? "solid") === "solid" ? "" : look.dash.replaceAll("px", "");
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      const parts = [
        ["line", { x1: 0, y1: 6, x2: 36, y2: 6, "stroke-width": 2.5, "stroke-dasharray": dash }],
        ["circle", { cx: 18, cy: 6, r: 3.5, "stroke-width": 2 }],
        ["rect", { x: 14.5, y: 2.5, width: 7, height: 7, "stroke-width": 2,
          transform: look.symbol?.startsWith("diamond") ? "rotate(45 18 6)" : "" }],
      ];
      svg.setAttribute("viewBox", "0 0 36 12");
      svg.setAttribute("width", "36");
      svg.setAttribute("height", "12");
      for (const [tag, attributes] of parts) {
        if (tag === "circle" && look.symbol !== "circle-open") continue;
        if ((tag === "rect") !== (look.points === true)) continue;
        const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
        for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
        node.setAttribute("stroke", css(look.color));
        node.setAttribute("fill", css(look.points && !look.symbol.endsWith("-open") ? look.color : "--paper"));
        svg.append(node);
      }
      host.append(make("span", {}, svg, look.name));
    }
  }

  function extent(values, log) {
    let low = Infinity;
    let high = -Infinity;
    for (const value of values) {
      if (value === null || (log && value <= 0)) continue;
      const at = log ? Math.log10(value) : value;
      low = Math.min(low, at);
      high = Math.max(high, at);
    }
    if (low > high) return [0, 1];
    const room = (high - low || Math.abs(high) || 1) * 0.04;
    return [low - room, high + room];
  }

  function axis(range, log, ticks) {
    return {
      type: log ? "log" : "linear", range, fixedrange: true, nticks: ticks, zeroline: false,
      gridcolor: css("--line"), linecolor: css("--line"), tickcolor: css("--line"),
      exponentformat: "SI", minexponent: 4, automargin: true, ticks: "outside", ticklen: 4,
      ...(log && range[1] - range[0] > 1.5 ? { dtick: Math.ceil((range[1] - range[0]) / ticks) } : {}),
    };
  }

  function curves(host, figure) {
    const looks = stylesOf(figure);
    drawLegend(host.parentElement.querySelector(".legend"), looks);
    const series = figure.panels.flatMap((panel) => panel.series);
    const xs = extent(series.flatMap((s) => s.x), figure.x.log);
    const ys = extent(series.flatMap((s) => [...s.y, ...(s.lo ?? []), ...(s.hi ?? [])]), figure.y.log);
    host.classList.toggle("single", figure.panels.length === 1);
    const family = getComputedStyle(document.body).fontFamily;
    const layout = {
      margin: { l: 8, r: 8, t: 8, b: 8 }, showlegend: false, dragmode: false, hovermode: "closest",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family, size: 11.5, color: css("--muted") },
      hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), align: "left",
        font: { family, color: css("--ink"), size: 12 } },
    };
    for (const [place, panel] of figure.panels.entries()) {
      const plot = host.children[place].querySelector(".plot");
      const bands = [];
      const lines = [];
      for (const s of panel.series) {
        const look = looks.get(s.style + "\n" + s.name);
        const color = css(look.color);
        const base = { x: s.x, type: "scatter", mode: "lines", showlegend: false };
        if (look.points) {
          const above = s.y.map((y, at) => (s.hi ? s.hi[at] - y : 0));
          const below = s.y.map((y, at) => (s.lo ? y - s.lo[at] : 0));
          lines.push({
            ...base, y: s.y, mode: "markers", cliponaxis: false,
            marker: { color, size: 9, symbol: look.symbol, line: { width: 1.6, color } },
            error_y: { type: "data", symmetric: false, array: above, arrayminus: below, color, width: 3,
              visible: [...above, ...below].some((length) => length > 0) },
            hovertemplate: `<b>${plain(s.name)}</b><br>${plain(figure.x.label)} %{x}<br>` +
              `${plain(figure.y.label)} %{y:.4~g}<extra></extra>`,
          });
          continue;
        }
        if (s.lo && s.hi) {
          const edge = { ...base, line: { width: 0 }, hoverinfo: "skip" };
          bands.push({ ...edge, y: s.lo }, { ...edge, y: s.hi, fill: "tonexty", fillcolor: faint(color) });
        }
        const spread = s.x.map((_, at) => (s.lo && s.hi ? `<br>spread ${shown(s.lo[at])} to ${shown(s.hi[at])}` : ""));
        lines.push({
          ...base, y: s.y, customdata: spread, mode: look.dash === "solid" ? "lines" : "lines+markers",
          line: { color, width: 2, dash: look.dash },
          marker: { color, size: 6, symbol: look.symbol, maxdisplayed: 9, line: { width: 1.6 } },
          hovertemplate: `<b>${plain(s.name)}</b><br>${plain(figure.x.label)} %{x}<br>` +
            `${plain(figure.y.label)} %{y:.4~g}%{customdata}<br>n = ${shown(s.n)}<extra></extra>`,
        });
      }
      Plotly.react(plot, [...bands, ...lines],
        { ...layout, xaxis: axis(xs, figure.x.log, 5), yaxis: axis(ys, figure.y.log, 5) },
        { displayModeBar: false, responsive: true });
    }
  }

  const records = recordFigures({ css, plain, axis, extent, make });
  const DRAW = { curves, ...records.draw }; // kind of figure -> function that draws it

  function draw(figureNode) {
    const figure = FIGURES[figureNode.dataset.figure];
    const host = figureNode.querySelector(".panels");
    const drawer = Object.hasOwn(DRAW, figure.kind) ? DRAW[figure.kind] : null;
    if (!drawer || !figure.panels.length) {
      host.replaceChildren(make("p", { class: "empty" }, "There is nothing to draw here."));
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
  window.addEventListener("beforeprint", () => figures.forEach(draw));
  const redraw = () => figures.filter((node) => node.dataset.drawn).forEach(draw);

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

  // --- all claims ------------------------------------------------------------------------
  const filter = document.querySelector(".filter");
  if (filter) {
    const items = all(".claims > li").map((node) => ({
      node, text: node.textContent.toLowerCase(), status: node.dataset.status.split(" "),
    }));
    const apply = () => {
      const words = filter.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
      const status = filter.elements.status.value;
      const topic = filter.elements.topic.value;
      let count = 0;
      for (const { node, text, status: own } of items) {
        const fits = words.every((word) => text.includes(word)) &&
          (!status || own.includes(status)) && (!topic || node.dataset.topic === topic);
        node.hidden = !fits;
        count += fits;
      }
      filter.querySelector("output").textContent = `${count} of ${items.length}`;
      document.getElementById("nothing").hidden = count > 0;
    };
    filter.hidden = false;
    filter.addEventListener("input", apply);
    filter.addEventListener("submit", (event) => event.preventDefault());
    apply();
  }

  // --- links into closed parts, copying --------------------------------------------------
  const reveal = () => {
    let target = null;
    try {
      target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    } catch {
      return; // not an address that this page gave
    }
    if (!target) return;
    target.hidden = false;
    const inner = target.matches(".claims > li") ? target.querySelector("details") : target.closest("details");
    if (inner) inner.open = true;
    target.scrollIntoView();
  };
  window.addEventListener("hashchange", reveal);
  if (location.hash) reveal();

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
