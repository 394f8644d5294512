// Figures of experiments: curves with bands, curves with a slider, heat maps.
const figuresOf = (tools) => {
  "use strict";
  const { root, make, view, shown, stepper } = tools;

  // Color, dash and marker by style: no curve is told by its color alone.
  const KNOWN = {
    bn: { color: "--curve-bn", dash: "solid", symbol: "circle" },
    none: { color: "--curve-none", dash: "7px,4px", symbol: "circle-open" },
    brn: { color: "--curve-2", dash: "2px,3px", symbol: "square-open" },
    // a fit beside its target; a density, and what it was before
    fit: { color: "--curve-3", dash: "solid", symbol: "circle" },
    target: { color: "--curve-5", dash: "7px,4px", symbol: "circle", bare: true },
    density: { color: "--curve-2", dash: "solid", symbol: "circle", area: true },
    before: { color: "--curve-5", dash: "2px,3px", symbol: "circle", bare: true },
    // numbers of others beside our curves: marks without a line
    "bn-points": { color: "--curve-bn", points: true, symbol: "diamond" },
    "none-points": { color: "--curve-none", points: true, symbol: "diamond-open" },
    "brn-points": { color: "--curve-2", points: true, symbol: "square" },
  };
  const COLORS = ["--curve-2", "--curve-3", "--curve-4", "--curve-5"];
  const DASHES = ["2px,3px", "9px,3px,2px,3px", "12px,4px", "4px,2px", "solid"];
  const SYMBOLS = ["square-open", "diamond-open", "triangle-up-open", "x-thin-open",
    "triangle-down-open", "cross-open", "star-open"];
  const other = (at) => ({
    color: COLORS[at % 4], dash: DASHES[(at + Math.floor(at / 4)) % 5], symbol: SYMBOLS[at % 7],
    marked: true,
  });
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
        const look = known ?? other(others++);
        found.set(key, { ...look, style: s.style, name: s.name });
      }
    }
    return found;
  }

  // Shapes of the legend, in a box of 36 by 12; a color goes with a dash and a shape.
  const SHAPES = {
    circle: "M14.5 6a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z", square: "M14.5 2.5h7v7h-7z",
    diamond: "M18 1.2l4.8 4.8-4.8 4.8-4.8-4.8z", "triangle-up": "M18 1.8l4 7.4h-8z",
    "triangle-down": "M18 10.2l4-7.4h-8z", "x-thin": "M14.5 2.5l7 7m0-7l-7 7",
    cross: "M18 2v8M14 6h8", star: "M18 1.5v9M14.1 3.8l7.8 4.4m0-4.4l-7.8 4.4",
  };

  function drawLegend(host, looks) {
    host.replaceChildren();
    for (const look of looks.values()) {
      const dash = (look.dash ?? "solid") === "solid" ? "" : look.dash.replaceAll("px", "");
      const parts = [];
      if (look.area) parts.push({ d: "M0 6h36v6h-36z", stroke: "none", fill: faint(css(look.color)) });
      if (!look.points) parts.push({ d: "M0 6h36", "stroke-width": 2.5, "stroke-dasharray": dash });
      const open = look.symbol.endsWith("-open");
      const marked = look.points || look.marked || open;
      const fill = css(look.points && !open ? look.color : "--paper");
      if (marked) parts.push({ d: SHAPES[look.symbol.replace("-open", "")], "stroke-width": 1.8, fill });
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      for (const [key, value] of Object.entries({ viewBox: "0 0 36 12", width: 36, height: 12 })) {
        svg.setAttribute(key, value);
      }
      for (const attributes of parts) {
        const node = document.createElementNS("http://www.w3.org/2000/svg", "path");
        node.setAttribute("stroke", css(look.color));
        for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
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

  function layoutOf(xaxis, yaxis) {
    const family = getComputedStyle(document.body).fontFamily;
    return {
      margin: { l: 8, r: 8, t: 8, b: 8 }, showlegend: false, dragmode: false, hovermode: "closest",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family, size: 11.5, color: css("--muted") }, xaxis, yaxis,
      hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), align: "left",
        font: { family, color: css("--ink"), size: 12 } },
    };
  }
  const react = (plot, traces, layout) =>
    Plotly.react(plot, traces, layout, { displayModeBar: false, responsive: true });
  const plotOf = (host, place) => host.children[place].querySelector(".plot");

  // A few ways to look at one figure: a button for each; the one that is pressed.
  function viewChoice(figureNode, names, redraw) {
    const box = figureNode.querySelector(".views");
    const key = "view." + figureNode.id;
    if (!box.children.length) {
      const kept = names.includes(view.get(key)) ? view.get(key) : names[0];
      for (const name of names) {
        const pressed = String(name === kept);
        const button = make("button", { type: "button", class: "quiet", "aria-pressed": pressed }, name);
        button.addEventListener("click", () => {
          for (const other of box.children) other.setAttribute("aria-pressed", String(other === button));
          view.set(key, name, names[0]);
          redraw();
        });
        box.append(button);
      }
    }
    return box.querySelector("[aria-pressed=true]").textContent;
  }

  // Points with the range of what was read off, where a series has no line.
  function markers(s, look, color, figure) {
    const above = s.y.map((y, at) => (s.hi ? s.hi[at] - y : 0));
    const below = s.y.map((y, at) => (s.lo ? y - s.lo[at] : 0));
    return {
      x: s.x, y: s.y, type: "scatter", mode: "markers", showlegend: false, cliponaxis: false,
      marker: { color, size: 9, symbol: look.symbol, line: { width: 1.6, color } },
      error_y: { type: "data", symmetric: false, array: above, arrayminus: below, color, width: 3,
        visible: [...above, ...below].some((length) => length > 0) },
      hovertemplate: `<b>${plain(s.name)}</b><br>${plain(figure.x.label)} %{x}<br>` +
        `${plain(figure.y.label)} %{y:.4~g}<extra></extra>`,
    };
  }

  // The traces of one panel, bands below lines; of series whose x, y, lo and hi are lists.
  function traces(series, looks, figure) {
    const bands = [];
    const lines = [];
    for (const s of series) {
      const look = looks.get(s.style + "\n" + s.name);
      const color = css(look.color);
      const base = { x: s.x, type: "scatter", mode: "lines", showlegend: false, ...(s.below ? { yaxis: "y2" } : {}) };
      if (look.points) {
        lines.push(markers(s, look, color, figure));
        continue;
      }
      if (s.lo && s.hi) {
        const edge = { ...base, line: { width: 0 }, hoverinfo: "skip" };
        bands.push({ ...edge, y: s.lo }, { ...edge, y: s.hi, fill: "tonexty", fillcolor: faint(color) });
      }
      const spread = s.x.map((_, at) => (s.lo && s.hi ? `<br>spread ${shown(s.lo[at])} to ${shown(s.hi[at])}` : ""));
      lines.push({
        ...base, y: s.y, customdata: spread,
        mode: look.bare || (look.dash === "solid" && !look.marked) ? "lines" : "lines+markers",
        ...(look.area ? { fill: "tozeroy", fillcolor: faint(color) } : {}),
        line: { color, width: 2, dash: look.dash },
        marker: { color, size: 6, symbol: look.symbol, maxdisplayed: 9, line: { width: 1.6 } },
        hovertemplate: `<b>${plain(s.name)}</b><br>${plain(figure.x.label)} %{x}<br>` +
          `${plain(s.below ? figure.strip.label : figure.y.label)} %{y:.4~g}%{customdata}` +
          `${s.n === null ? "" : `<br>n = ${shown(s.n)}`}<extra></extra>`,
      });
    }
    return [...bands, ...lines];
  }

  function curves(host, figure) {
    const figureNode = host.closest("[data-figure]");
    const matrices = asMatrices(figure);
    if (matrices && viewChoice(figureNode, ["Curves", "Heat map"], () => curves(host, figure)) === "Heat map") {
      figureNode.dataset.view = "heat";
      heat(host, matrices);
      return;
    }
    delete figureNode.dataset.view;
    const looks = stylesOf(figure);
    drawLegend(figureNode.querySelector(".legend"), looks);
    const series = figure.panels.flatMap((panel) => panel.series);
    const xs = extent(series.flatMap((s) => s.x), figure.x.log);
    const ys = extent(series.flatMap((s) => [...s.y, ...(s.lo ?? []), ...(s.hi ?? [])]), figure.y.log);
    host.classList.toggle("single", figure.panels.length === 1);
    for (const [place, panel] of figure.panels.entries()) {
      react(plotOf(host, place), traces(panel.series, looks, figure),
        layoutOf(axis(xs, figure.x.log, 5), axis(ys, figure.y.log, 5)));
    }
  }

  // --- steps: one slider for all arms and panels ------------------------------------------
  // All that a series shows at any place, so that its axes stay as they are.
  const everywhere = (series) => series.flatMap((s) =>
    [...s.y, ...(s.lo ?? []), ...(s.hi ?? [])].filter(Boolean).flat());

  function steps(host, figure) {
    const figureNode = host.closest("[data-figure]");
    const { at } = stepper(figureNode, figure.steps, () => steps(host, figure),
      { name: figure.slider, first: figure.opens });
    const looks = stylesOf(figure);
    drawLegend(figureNode.querySelector(".legend"), looks);
    const series = figure.panels.flatMap((panel) => panel.series);
    const above = (some) => extent([...everywhere(some.filter((s) => !s.below)), figure.line ?? null], figure.y.log);
    const xs = extent(series.flatMap((s) => s.x), figure.x.log);
    const ys = above(series);
    const strip = figure.strip && extent([0, ...everywhere(series.filter((s) => s.below))], false);
    host.classList.toggle("tall", Boolean(strip));
    host.classList.toggle("single", figure.panels.length === 1);
    const guide = figure.line === undefined ? [] : [{ type: "line", xref: "paper", x0: 0, x1: 1,
      y0: figure.line, y1: figure.line, line: { color: css("--muted"), width: 1, dash: "dot" } }];
    for (const [place, panel] of figure.panels.entries()) {
      const now = panel.series.map((s) => [s, s.fixed ? 0 : at]).filter(([s, place]) => s.y[place])
        .map(([s, place]) => ({ ...s, y: s.y[place], lo: s.lo?.[place], hi: s.hi?.[place] }));
      const start = panel.series.filter((s) => figure.start && s.y[0]).map((s) => ({
        x: s.x, y: s.y[0], type: "scatter", mode: "lines", showlegend: false, hoverinfo: "skip",
        opacity: 0.55, line: { color: css(looks.get(s.style + "\n" + s.name).color), width: 1.2, dash: "dot" },
      }));
      const yaxis = axis(figure.each ? above(panel.series) : ys, figure.y.log, 5);
      const layout = { ...layoutOf(axis(xs, figure.x.log, 5), yaxis), shapes: guide };
      if (strip) {
        yaxis.domain = [figure.strip.share + 0.06, 1];
        layout.yaxis2 = { ...axis(strip, false, 3), domain: [0, figure.strip.share] };
        layout.xaxis.anchor = "y2";
      }
      react(plotOf(host, place), [...start, ...traces(now, looks, figure)], layout);
    }
  }

  // --- heat maps: numbers over rows and columns -------------------------------------------
  // Curves that can be seen as a matrix: three or more of them in a panel, over a few places.
  function asMatrices(figure) {
    if (figure.kind !== "curves" || !figure.panels.length) return null;
    const panels = [];
    for (const panel of figure.panels) {
      const series = panel.series.filter((s) => !s.style.endsWith("-points"));
      const columns = [...new Set(series.flatMap((s) => s.x))].sort((a, b) => a - b);
      const whole = series.every((s) => s.x.length > columns.length / 3);
      if (series.length < 3 || columns.length < 2 || columns.length > 80 || !whole) return null;
      const z = series.map((s) => columns.map((x) => s.y[s.x.indexOf(x)] ?? null));
      panels.push({ title: panel.title, rows: series.map((s) => s.name), columns, z });
    }
    return { ...figure, panels };
  }

  function heat(host, figure) {
    host.closest("[data-figure]").querySelector(".legend").replaceChildren();
    host.classList.toggle("single", figure.panels.length === 1);
    const range = heatRange(figure.panels.flatMap((panel) => panel.z.flat()), figure.y.log);
    for (const [place, panel] of figure.panels.entries()) heatInto(plotOf(host, place), panel, range, figure);
    heatLegend(host, range);
  }

  // Numbers of both signs have two colors around zero; else one, on a logarithm where they need it.
  function heatRange(numbers, log = false) {
    const found = numbers.filter((value) => value !== null);
    const [low, high] = [Math.min(...found), Math.max(...found)];
    const positive = found.filter((value) => value > 0);
    if (low < 0 && high > 0) {
      const most = Math.max(-low, high);
      return { low: -most, high: most, log: false, two: true };
    }
    const least = Math.min(...positive);
    const asLog = positive.length > 0 && low >= 0 && (log || high > 30 * least);
    return { low: asLog ? least : low, high, log: asLog, two: false };
  }

  function heatColors(range) {
    const one = [[0, css("--paper")], [1, css("--curve-bn")]];
    return range.two ? [[0, css("--curve-none")], [0.5, css("--paper")], [1, css("--curve-bn")]] : one;
  }

  function heatInto(plot, panel, range, figure) {
    const at = (value) => (range.log ? Math.log10(value) : value);
    const z = panel.z.map((row) => row.map((v) => (v === null || (range.log && v <= 0) ? null : at(v))));
    const text = panel.z.map((row) => row.map((v) => (v === null ? "" : String(Number(v.toPrecision(2))))));
    const few = panel.columns.length <= 10 && panel.rows.length <= 12;
    const every = Math.ceil(panel.columns.length / 8);
    const ticks = (values, step) => ({
      type: "linear", fixedrange: true, zeroline: false, showgrid: false, automargin: true, ticks: "",
      tickvals: values.map((_, place) => place).filter((place) => place % step === 0),
      ticktext: values.filter((_, place) => place % step === 0).map((value) => plain(clip(shown(value)))),
    });
    const columns = { ...ticks(panel.columns, every), range: [-0.5, panel.columns.length - 0.5] };
    const rows = { ...ticks(panel.rows, Math.ceil(panel.rows.length / 16)), range: [panel.rows.length - 0.5, -0.5] };
    react(plot, [{
      type: "heatmap", z, text, zmin: at(range.low), zmax: at(range.high), showscale: false, xgap: 1, ygap: 1,
      customdata: panel.rows.map((row) => panel.columns.map((column) => [plain(shown(row)), shown(column)])),
      colorscale: heatColors(range), hoverongaps: false,
      ...(few ? { texttemplate: "%{text}", textfont: { color: css("--ink"), size: 10.5 } } : {}),
      hovertemplate: `${plain(figure.y.label)}: %{customdata[0]}<br>${plain(figure.x.label)}: ` +
        "%{customdata[1]}<br>%{text}<extra></extra>",
    }], layoutOf(columns, rows));
  }
  const clip = (text) => (text.length > 22 ? text.slice(0, 10) + "…" + text.slice(-11) : text);

  function heatLegend(host, range) {
    const ramp = make("i", { class: "ramp" });
    ramp.style.background = `linear-gradient(to right, ${heatColors(range).map((stop) => stop[1]).join(", ")})`;
    const ends = [range.low, range.high].map((value) => shown(Number(value.toPrecision(3))));
    const how = range.log ? " (logarithmic)" : "";
    host.closest("[data-figure]").querySelector(".legend")
      .replaceChildren(make("span", {}, ends[0], ramp, ends[1] + how));
  }

  // --- the numbers of a figure as columns, for its table -----------------------------------
  function figureData(figure) {
    if (figure.kind === "heat") return matrixData(figure);
    const stepped = figure.kind === "steps";
    const names = ["panel", "series", "n", ...(stepped ? [figure.slider] : []), "x", "y", "lo", "hi"];
    const values = names.map(() => []);
    for (const panel of figure.panels) {
      for (const s of panel.series) {
        for (const [index, step] of (stepped && !s.fixed ? figure.steps : [null]).entries()) {
          const [y, lo, hi] = ["y", "lo", "hi"].map((key) => (stepped ? s[key]?.[index] : s[key]));
          if (!y) continue; // not measured at this step
          s.x.forEach((x, at) => {
            const row = [panel.title, s.name, s.n, ...(stepped ? [step] : []), x, y[at], lo?.[at], hi?.[at]];
            row.forEach((value, column) => values[column].push(value));
          });
        }
      }
    }
    return { names, values, rows: values[0].length };
  }

  function matrixData(figure) {
    const names = ["panel", figure.y.label, figure.x.label, "value"];
    const rows = figure.panels.flatMap((panel) => panel.rows.flatMap((row, at) =>
      panel.columns.map((column, place) => [panel.title, row, column, panel.z[at][place]])));
    return { names, rows: rows.length, values: names.map((_, at) => rows.map((row) => row[at])) };
  }

  const own = { curves, steps, heat };
  return {
    draw: own, data: (figure) => (Object.hasOwn(own, figure.kind) ? figureData(figure) : null),
    css, plain, axis, extent, react, plotOf, layoutOf, viewChoice, heatRange, heatInto, heatLegend,
  };
};
