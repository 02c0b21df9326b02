// Before the first paint, so that no page flashes in the other theme.
"use strict";
{
  const chosen = localStorage.getItem("reprise.theme");
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = chosen ?? (dark ? "dark" : "light");
}
