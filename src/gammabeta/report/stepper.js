// A slider over steps, or over places of something else, with a button that plays them: the
// browser's own controls, so that the keyboard works as everywhere. One stepper moves all panels and
// arms of its figure.
const stepperOf = (tools) => {
  "use strict";
  const { make, view } = tools;
  const PAUSE = 450; // milliseconds for each step

  // Returns the box of controls, made once for a figure, and the place that it stands at; `name`
  // is what the slider moves, `first` where it stands when the page opens.
  return (figureNode, steps, changed, { name = "step", first = steps.length - 1 } = {}) => {
    let box = figureNode.querySelector(".controls");
    if (box) return { box, at: Number(box.querySelector("input").value) };
    const key = "at." + figureNode.id;
    const last = steps.length - 1;
    const kept = Number(view.get(key) ?? first);
    const start = Number.isInteger(kept) && kept >= 0 && kept <= last ? kept : first;
    const slider = make("input", { type: "range", min: 0, max: last, step: 1, value: start });
    const said = make("output", { class: "num" });
    const play = make("button", { type: "button", class: "quiet play", "aria-pressed": "false" }, "Play");
    let timer = 0;
    const say = () => {
      said.textContent = String(steps[slider.value]);
      slider.setAttribute("aria-valuetext", `${name} ${steps[slider.value]}`);
    };
    const show = () => { say(); view.set(key, slider.value, first); changed(); };
    const stop = () => {
      clearInterval(timer);
      timer = 0;
      play.textContent = "Play";
      play.setAttribute("aria-pressed", "false");
    };
    play.addEventListener("click", () => {
      if (timer) { stop(); return; }
      if (Number(slider.value) === last) { slider.value = 0; show(); }
      play.textContent = "Pause";
      play.setAttribute("aria-pressed", "true");
      timer = setInterval(() => {
        if (Number(slider.value) >= last) { stop(); return; }
        slider.value = Number(slider.value) + 1;
        show();
        if (Number(slider.value) === last) stop();
      }, PAUSE);
    });
    slider.addEventListener("input", () => { stop(); show(); });
    say();
    box = make("div", { class: "controls" });
    if (steps.length > 1) box.append(play);
    const label = name.charAt(0).toUpperCase() + name.slice(1);
    box.append(make("label", { class: "step" }, label + " ", slider, said));
    (figureNode.querySelector(".axis-y") ?? figureNode.querySelector(".panels")).before(box);
    return { box, at: start };
  };
};
