// Figures of recorded trainings. A slider chooses the step, a list the layer that stands out.
const recordFigures = (tools) => {
  "use strict";
  const { css, plain, axis, extent, react, plotOf, layoutOf, make, stepper, view, viewChoice } = tools;
  const SYMBOLS = ["circle", "square-open", "diamond-open", "triangle-up-open", "x-thin-open", "cross"];
  const DASHES = ["solid", "7px,4px", "2px,3px", "9px,3px,2px,3px", "12px,4px", "4px,2px"];
  const COLORS = ["--curve-bn", "--curve-none", "--curve-2", "--curve-3", "--curve-4", "--curve-5"];

  const mix = (a, b, share) => {
    const parts = [a, b].map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
    return "#" + parts[0].map((low, at) => Math.round(low + (parts[1][at] - low) * share))
      .map((value) => value.toString(16).padStart(2, "0")).join("");
  };

  // A few layers have a look each; many are colored by their depth, and one of them stands out.
  function lookOf(figure, layer) {
    const count = figure.layers.length;
    if (count <= COLORS.length) {
      return { color: css(COLORS[layer]), dash: DASHES[layer], symbol: SYMBOLS[layer] };
    }
    const color = mix(css("--curve-bn"), css("--curve-none"), layer / (count - 1));
    return { color, dash: "solid", symbol: "circle" };
  }

  // --- controls --------------------------------------------------------------------------
  function controls(host, figure, draw) {
    const figureNode = host.closest("[data-figure]");
    const { box, at } = stepper(figureNode, figure.steps, () => draw(host, figure));
    let list = box.querySelector("select");
    if (!list && figure.layers.length > 1) {
      const key = "out." + figureNode.id;
      list = make("select", {}, ...figure.layers.map((name, place) => make("option", { value: place }, name)));
      if (figure.kind !== "matrix") list.prepend(make("option", { value: -1 }, "none"));
      const own = figure.kind === "matrix" ? 0 : -1;
      list.value = view.get(key) ?? own;
      if (list.selectedIndex === -1) list.value = own;
      list.addEventListener("change", () => { view.set(key, list.value, own); draw(host, figure); });
      box.append(make("label", {}, figure.kind === "matrix" ? "Layer " : "Point out ", list));
    }
    return { at, chosen: Number(list?.value ?? (figure.kind === "matrix" ? 0 : -1)) };
  }

  function legend(host, figure) {
    const node = host.closest("[data-figure]").querySelector(".legend");
    node.replaceChildren();
    if (figure.layers.length <= COLORS.length) {
      for (const [at, name] of figure.layers.entries()) {
        const look = lookOf(figure, at);
        const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
        const dash = look.dash === "solid" ? "" : look.dash.replaceAll("px", "");
        const given = { x1: 0, y1: 6, x2: 36, y2: 6, "stroke-width": 2.5, "stroke-dasharray": dash };
        for (const [key, value] of Object.entries({ ...given, stroke: look.color })) line.setAttribute(key, value);
        for (const [key, value] of Object.entries({ viewBox: "0 0 36 12", width: 36, height: 12 })) svg.setAttribute(key, value);
        svg.append(line);
        node.append(make("span", {}, svg, name));
      }
      return;
    }
    const ramp = make("i", { class: "ramp" });
    ramp.style.background = `linear-gradient(to right, ${css("--curve-bn")}, ${css("--curve-none")})`;
    node.append(make("span", {}, figure.layers[0], ramp, figure.layers.at(-1)));
  }

  // --- lines -----------------------------------------------------------------------------
  function line(figure, layer, chosen, x, y, label, hover) {
    const look = lookOf(figure, layer);
    const out = layer === chosen;
    const dim = chosen >= 0 && !out;
    const many = figure.layers.length > COLORS.length || x.length > 60;
    return {
      // Over the steps each record is a marker: between two far apart nothing was measured.
      x, y, type: "scatter",
      mode: look.dash === "solid" && !out && figure.kind !== "layers" ? "lines" : "lines+markers",
      opacity: dim ? 0.45 : 1, showlegend: false, connectgaps: false,
      line: { color: out ? css("--ink") : look.color, width: out ? 3.5 : 1.8, dash: look.dash },
      marker: { color: out ? css("--ink") : look.color, symbol: look.symbol,
        size: many ? 4 : 6, maxdisplayed: figure.kind === "layers" ? 0 : 9 },
      hovertemplate: `<b>${plain(label)}</b><br>${hover}<extra></extra>`,
    };
  }

  // Where a line has one point it has to be a marker to be seen.
  const visible = (trace) => ({
    ...trace, mode: trace.y.filter((v) => v !== null).length < 2 ? "markers" : trace.mode,
  });
  const front = (traces, chosen) => // what stands out is drawn last
    chosen < 0 ? traces : [...traces.filter((_, at) => at !== chosen), traces[chosen]];

  function layers(host, figure) {
    const { at, chosen } = controls(host, figure, layers);
    const ys = extent(figure.values.flat(), figure.log);
    const step = figure.steps[at];
    const names = ["Curves", "Heat map"];
    const asHeat = figure.layers.length > 2 && figure.steps.length > 1 &&
      viewChoice(host.closest("[data-figure]"), names, () => layers(host, figure)) === names[1];
    if (asHeat) overDepth(host, figure);
    else legend(host, figure);
    const over = figure.layers.map((name, layer) => visible(
      line(figure, layer, chosen, figure.steps, figure.values[layer], name, "step %{x}<br>%{y:.4~g}")));
    const xs = extent(figure.steps, false);
    if (!asHeat) {
      react(plotOf(host, 0), front(over, chosen), {
        ...layoutOf(axis(xs, false, 5), axis(ys, figure.log, 5)),
        shapes: [{ type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: 1,
          line: { color: css("--muted"), width: 1, dash: "dot" } }],
      });
    }
    const places = figure.layers.map((_, layer) => layer + 1);
    const profile = (index, more) => ({
      x: places, y: figure.values.map((values) => values[index]), type: "scatter",
      mode: "lines+markers", showlegend: false,
      text: figure.layers.map(plain), ...more,
      hovertemplate: `<b>%{text}</b><br>step ${figure.steps[index]}<br>%{y:.4~g}<extra></extra>`,
    });
    const sizes = places.map((_, layer) => (layer === chosen ? 12 : 7));
    const colors = places.map((_, layer) => (layer === chosen ? css("--ink") : lookOf(figure, layer).color));
    const few = places.length <= 12;
    const depth = {
      ...axis([0.5, places.length + 0.5], false, 8),
      ...(few ? { tickvals: places, ticktext: figure.layers.map(short) } : {}),
    };
    const first = { line: { color: css("--muted"), width: 1, dash: "dot" }, opacity: 0.7,
      marker: { color: css("--muted"), size: 4 } };
    const now = { line: { color: css("--muted"), width: 1.2 }, marker: { color: colors, size: sizes } };
    react(plotOf(host, 1), [profile(0, first), profile(at, now)],
      layoutOf(depth, axis(ys, figure.log, 5)));
  }
  // The layers as rows, the steps as columns; at most 200 of these.
  function overDepth(host, figure) {
    const stride = Math.ceil(figure.steps.length / 200);
    const pick = (values) => values.filter((_, at) => at % stride === 0);
    const range = tools.heatRange(figure.values.flat(), figure.log);
    const panel = { rows: figure.layers, columns: pick(figure.steps), z: figure.values.map(pick) };
    tools.heatInto(plotOf(host, 0), panel, range, { x: { label: "step" }, y: { label: "layer" } });
    tools.heatLegend(host, range);
  }

  const short = (name) => plain(name.length > 14 ? "…" + name.slice(-13) : name);

  function spectrum(host, figure) {
    const { at, chosen } = controls(host, figure, spectrum);
    legend(host, figure);
    const all = figure.values.flatMap((values) => values.filter(Boolean).flat());
    const ys = extent(all, figure.log);
    const places = (values) => values.map((_, place) => (values.length > 1 ? (100 * place) / (values.length - 1) : 0));
    const traces = (index) => figure.layers.map((name, layer) => {
      const values = figure.values[layer][index] ?? [];
      return visible(line(figure, layer, chosen, places(values), values, name, "%{x:.3~g} % of them<br>%{y:.4~g}"));
    });
    const one = chosen >= 0 ? chosen : figure.layers.length === 1 ? 0 : -1;
    const past = one < 0 ? [] : [{ ...traces(0)[one], opacity: 0.6, mode: "lines",
      line: { color: css("--muted"), width: 1.5, dash: "dot" }, hoverinfo: "skip", hovertemplate: null }];
    host.classList.add("single");
    react(plotOf(host, 0), [...past, ...front(traces(at), chosen)],
      layoutOf({ ...axis([-2, 102], false, 5), ticksuffix: " %" }, axis(ys, figure.log, 5)));
  }

  function matrix(host, figure) {
    const { at, chosen } = controls(host, figure, matrix);
    const values = figure.values[chosen][at] ?? [[]];
    const [low, high] = extent(figure.values[chosen].filter(Boolean).flat(2), figure.log);
    const z = figure.log ? values.map((row) => row.map((v) => (v > 0 ? Math.log10(v) : null))) : values;
    const text = values.map((row) => row.map((v) => (v === null ? "" : String(Number(v.toPrecision(2))))));
    host.classList.add("single");
    const readable = values.length <= 12 && values[0].length <= 12;
    react(plotOf(host, 0), [{
      type: "heatmap", z, zmin: low, zmax: high, text, showscale: false, xgap: 1, ygap: 1,
      colorscale: [[0, css("--paper")], [1, css("--curve-bn")]],
      ...(readable ? { texttemplate: "%{text}", textfont: { color: css("--ink") } } : {}),
      hovertemplate: "row %{y}, column %{x}<br>%{text}<extra></extra>",
    }], layoutOf(axis([-0.5, (values[0].length || 1) - 0.5], false, 8),
      axis([values.length - 0.5, -0.5], false, 8)));
  }

  function whole(host, figure) {
    for (const [place, panel] of figure.panels.entries()) {
      const color = css("--curve-bn");
      const trace = visible({
        x: panel.x, y: panel.y, type: "scatter", mode: "lines+markers", showlegend: false,
        line: { color, width: 2 }, marker: { color, size: panel.x.length > 60 ? 3 : 6 },
        hovertemplate: `<b>${plain(panel.title)}</b><br>step %{x}<br>%{y:.4~g}<extra></extra>`,
      });
      react(plotOf(host, place), [trace], layoutOf(axis(extent(panel.x, false), false, 4),
        axis(extent(panel.y, panel.log), panel.log, 4)));
    }
  }

  // The numbers of a figure as columns, for its table.
  function data(figure) {
    const names = figure.kind === "whole" ? ["quantity", "step", "value"] : ["layer", "step", "place", "value"];
    const rows = [];
    if (figure.kind === "whole") {
      for (const panel of figure.panels) panel.x.forEach((x, at) => rows.push([panel.title, x, panel.y[at]]));
    } else {
      for (const [layer, name] of figure.layers.entries()) {
        for (const [at, step] of figure.steps.entries()) {
          [figure.values[layer][at]].flat().forEach((row, place) =>
            [row].flat().forEach((value, column) =>
              rows.push([name, step, Array.isArray(row) ? `${place} ${column}` : place, value])));
        }
      }
    }
    return { names, rows: rows.length, values: names.map((_, column) => rows.map((row) => row[column])) };
  }

  return { draw: { layers, spectrum, matrix, whole }, data };
};
