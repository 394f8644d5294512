// What a reader has set (filters, sliders, what is open, where on the page) lives in the address,
// after "#": an anchor, then key=value parts. Sent to someone else, it shows the same view.
const viewOf = (location_, history_) => {
  "use strict";
  const values = new Map();
  let anchor = "";
  let timer = 0;
  let known = location_.hash;
  let place = history_.state?.place ?? null;

  function read() {
    values.clear();
    const [first = "", ...rest] = location_.hash.slice(1).split("&");
    anchor = first.includes("=") ? "" : decode(first);
    for (const part of first.includes("=") ? [first, ...rest] : rest) {
      const at = part.indexOf("=");
      if (at > 0) values.set(decode(part.slice(0, at)), decode(part.slice(at + 1)));
    }
  }

  function decode(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return ""; // not an address that this page gave
    }
  }

  function write() {
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (location_.hash !== known) return; // a link was followed, of which `followed` will hear
      const parts = [...values].map((pair) => pair.map(encodeURIComponent).join("="));
      history_.replaceState({ place }, "", "#" + [encodeURIComponent(anchor), ...parts].join("&"));
      known = location_.hash;
    }, 120); // browsers allow only so many changes of the address in a second
  }

  read();
  return {
    get: (key) => values.get(key) ?? null,
    // The value that a page has by itself is not written down.
    set(key, value, own = "") {
      if (String(value) === String(own)) values.delete(key);
      else values.set(key, String(value));
      write();
    },
    get anchor() { return anchor; },
    // How far the page was scrolled: kept with the entry of the history, for the way back.
    get place() { return place; },
    stay(at) {
      place = at;
      if (location_.hash === known) history_.replaceState({ place }, "");
    },
    moved(name) {
      if (name === anchor) return;
      anchor = name;
      write();
    },
    // A link on the page was followed: its anchor is new, the rest of the view stays.
    followed() {
      known = location_.hash;
      place = history_.state?.place ?? null;
      const hash = known.slice(1);
      if (hash.includes("=")) read();
      else anchor = decode(hash);
      write();
    },
  };
};
