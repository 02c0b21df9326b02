(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "dark" : "light";
  document.getElementById("theme").onclick = () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  };
  const tip = document.getElementById("tip");
  const show = (text, x, y) => {
    tip.textContent = text;
    tip.style.display = "block";
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18) + "px";
  };
  const hide = () => { tip.style.display = "none"; };
  for (const each of document.querySelectorAll("[data-tip]")) {
    each.addEventListener("mousemove", (e) => show(each.dataset.tip, e.clientX, e.clientY));
    each.addEventListener("mouseleave", hide);
    each.addEventListener("focusin", () => {
      const box = each.getBoundingClientRect();
      show(each.dataset.tip, box.left, box.bottom - 14);
    });
    each.addEventListener("focusout", hide);
  }
})();
