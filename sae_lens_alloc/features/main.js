// Which view is shown follows the address: #features, #f512, #text.
async function main() {
  const model = makeModel(await unpack(document.getElementById("data").textContent));
  const detail = document.getElementById("detail");
  const views = { features: document.getElementById("view-features"), text: document.getElementById("view-text") };
  let hasText = false, goesToSearch = false;
  views.features.hidden = false;
  const list = makeList(model, row => { location.hash = `f${model.number(row)}`; });

  function route(event) {
    const [, wanted] = location.hash.match(/^#f(\d+)$/) || [];
    const view = location.hash === "#text" ? "text" : "features";
    for (const [name, element] of Object.entries(views)) element.hidden = name !== view;
    for (const link of document.querySelectorAll("nav a")) {
      if (link.dataset.view === view) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
    }
    if (view === "text") {
      if (!hasText) makeTextView(model);
      hasText = true;
      return;
    }
    const row = wanted === undefined ? undefined : model.rowOf.get(+wanted);
    document.body.classList.toggle("opened", row !== undefined);
    if (row === undefined) {
      list.draw();
      if (detail.childElementCount === 0 && list.first() !== undefined) {
        list.show(list.first());
        showFeature(model, list.first(), detail, list.beside);
      }
      if (event && goesToSearch) list.focusSearch(); else if (event) list.focus();
      goesToSearch = false;
      return;
    }
    list.show(row);
    showFeature(model, row, detail, list.beside);
    detail.scrollTop = 0;
    if (event) { window.scrollTo(0, 0); document.getElementById("feature-name").focus({ preventScroll: true }); }
  }

  window.addEventListener("hashchange", route);
  document.addEventListener("keydown", event => {
    if (views.features.hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    const isTyping = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "/" && !isTyping) {
      event.preventDefault();
      goesToSearch = document.body.classList.contains("opened");
      if (goesToSearch) location.hash = "features"; else list.focusSearch();
    } else if (event.key === "Escape" && !isTyping) location.hash = "features";
  });
  route(null);
}

main().catch(error => {
  const failure = document.getElementById("failure");
  failure.textContent = error.message;
  failure.hidden = false;
  throw error;
});
