// The list of all claims: search, filters, order.
const claimList = (tools) => {
  "use strict";
  const { all, view } = tools;
  const filter = document.querySelector(".filter");
  if (!filter) return;
  const list = document.querySelector(".claims");
  const items = all(".claims > li").map((node) => ({
    node, text: node.textContent.toLowerCase(), status: node.dataset.status.split(" "),
    sources: JSON.parse(node.dataset.source),
    effect: node.dataset.effect === undefined ? null : Number(node.dataset.effect),
  }));
  const FIELDS = ["text", "status", "source", "topic", "differ", "mark", "order"];
  const field = (name) => filter.elements.namedItem(name);

  function sorted(order) {
    if (order !== "down" && order !== "up") return items;
    const sign = order === "down" ? -1 : 1;
    const known = items.filter((item) => item.effect !== null);
    known.sort((a, b) => sign * (a.effect - b.effect));
    return [...known, ...items.filter((item) => item.effect === null)];
  }

  // On a narrow screen all but the search is folded.
  const more = filter.querySelector(".filters");
  function unfold(open) {
    filter.classList.toggle("open", open);
    more.setAttribute("aria-expanded", String(open));
  }
  more.addEventListener("click", () => unfold(!filter.classList.contains("open")));

  let shownOrder = "";
  function apply() {
    const words = field("text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const [status, source, topic, differ, mark, order] = FIELDS.slice(1).map((name) => field(name).value);
    let count = 0;
    for (const { node, text, status: own, sources } of items) {
      const fits = words.every((word) => text.includes(word)) && (!status || own.includes(status)) &&
        (!source || sources.includes(source)) && (!topic || node.dataset.topic === topic) &&
        (!differ || node.dataset.differ === differ || (differ === "yes" && node.dataset.differ)) &&
        (!mark || (node.dataset.marks ?? "").split(" ").includes(mark));
      node.hidden = !fits;
      count += fits;
    }
    if (order !== shownOrder) list.append(...sorted(order).map((item) => item.node));
    shownOrder = order;
    filter.querySelector("output").textContent = `${count} of ${items.length}`;
    document.getElementById("nothing").hidden = count > 0;
  }

  function restore() {
    for (const name of FIELDS) {
      const node = field(name);
      node.value = view.get(name) ?? "";
      if (node.selectedIndex === -1) node.value = ""; // not one of its choices
    }
    if (FIELDS.slice(1).some((name) => field(name).value)) unfold(true); // what is set is seen
    apply();
  }

  filter.hidden = false;
  filter.addEventListener("input", () => {
    apply();
    for (const name of FIELDS) view.set(name, field(name).value);
  });
  filter.addEventListener("submit", (event) => event.preventDefault());
  restore();
  return { restore };
};
