"use strict";
// The contents: open beside the text, folded above it on a narrow screen; the section in view is marked.
(() => {
  const contents = document.querySelector("nav details");
  const narrow = window.matchMedia("(max-width: 70rem)");
  const fold = () => { contents.open = !narrow.matches; };
  fold();
  narrow.addEventListener("change", fold);
  contents.addEventListener("click", (event) => {
    if (event.target.closest("a")) fold();
  });

  const links = new Map();
  for (const link of contents.querySelectorAll("a")) links.set(link.hash.slice(1), link);
  const headings = [...links.keys()].map((id) => document.getElementById(id)).filter(Boolean);
  const mark = () => {
    const line = 8 + parseFloat(getComputedStyle(document.documentElement).scrollPaddingTop); // a link leads there
    const above = headings.filter((heading) => heading.getBoundingClientRect().top < line);
    const current = links.get((above.pop() || headings[0]).id);
    for (const link of links.values()) {
      if (link === current) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    if (!narrow.matches) keepInView(current);
  };
  const keepInView = (link) => {
    const box = contents.parentElement;
    const [top, bottom] = [link.offsetTop, link.offsetTop + link.offsetHeight];
    if (top < box.scrollTop || bottom > box.scrollTop + box.clientHeight) {
      box.scrollTop = top - box.clientHeight / 3;
    }
  };
  let waiting = false;
  document.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; mark(); });
  }, { passive: true });
  mark();
})();
