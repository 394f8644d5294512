// Runs before anything is painted, so that a chosen theme does not flash.
(function () {
  "use strict";
  document.documentElement.classList.add("js");
  try {
    const theme = localStorage.getItem("gammabeta-theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // A page opened from disk may have no storage; the system's theme is used.
  }
})();
