// Text with the number of features of each token, and the features of the token that is chosen.
function makeTextView(model) {
  const { data } = model;
  const place = document.getElementById("snippets"), panel = document.getElementById("token");
  const tokens = [];
  const counts = [];
  let chosen = -1;

  function fill() {
    let n = 0;
    for (let s = 0; s < data.snippet_rows.length; s++) {
      const box = make("div", { class: "text whole snippet", role: "listbox", tabindex: s === 0 ? "0" : "-1", "aria-label": `Text ${s + 1} of ${data.snippet_rows.length}` });
      for (let i = 0; i < data.snippet_lengths[s]; i++, n++) {
        const word = model.wordAt(data.snippet_rows[s], data.snippet_starts[s] + i), at = n;
        counts.push(data.token_features_from[n + 1] - data.token_features_from[n]);
        const span = make("span", {
          role: "option", id: `token-${n}`, "aria-selected": "false",
          title: model.special.has(word) ? null : `${counts[n]} features`,
          class: model.special.has(word) ? "special" : null, onclick: () => choose(at),
        }, data.words[word]);
        span.setAttribute("aria-label", `${visible(data.words[word])}, ${counts[n]} features`);
        tokens.push(span);
        box.append(span);
      }
      box.addEventListener("focus", () => {
        if (chosen < 0 || !box.contains(tokens[chosen])) choose(tokens.indexOf(box.firstElementChild));
      });
      box.addEventListener("keydown", event => {
        const moves = { ArrowRight: chosen + 1, ArrowLeft: chosen - 1, Home: 0, End: tokens.length - 1, ArrowDown: below(1), ArrowUp: below(-1) };
        if (!(event.key in moves)) return;
        event.preventDefault();
        choose(Math.max(0, Math.min(tokens.length - 1, moves[event.key])));
      });
      place.append(box);
    }
    const sorted = [...counts].sort((a, b) => a - b);
    const most = Math.max(1, sorted[Math.floor(0.98 * (sorted.length - 1))] || 1);
    document.getElementById("most").textContent = `${most} features or more`;
    tokens.forEach((span, i) => span.style.setProperty("--a", Math.min(1, counts[i] / most).toFixed(3)));
    panel.replaceChildren(make("p", { class: "muted" }, "Choose a token to see its features."));
  }

  // The token nearest to the chosen one on the next or the previous line.
  function below(step) {
    if (chosen < 0) return 0;
    const from = tokens[chosen].getBoundingClientRect();
    let best = chosen, bestDistance = Infinity, line = null;
    for (let i = chosen + step; i >= 0 && i < tokens.length; i += step) {
      const box = tokens[i].getBoundingClientRect();
      if (Math.abs(box.top - from.top) < 4) continue;
      if (line === null) line = box.top;
      if (Math.abs(box.top - line) > 4) break;
      const distance = Math.abs(box.left - from.left);
      if (distance < bestDistance) [best, bestDistance] = [i, distance];
    }
    return best;
  }

  function choose(n) {
    if (chosen >= 0) tokens[chosen].setAttribute("aria-selected", "false");
    chosen = n;
    tokens[n].setAttribute("aria-selected", "true");
    const box = tokens[n].parentElement;
    for (const other of place.children) other.tabIndex = other === box ? 0 : -1;
    box.setAttribute("aria-activedescendant", `token-${n}`);
    if (document.activeElement !== box) box.focus({ preventScroll: true });
    tokens[n].scrollIntoView({ block: "nearest" });
    showToken(n);
  }

  function showToken(n) {
    const first = data.token_features_from[n], last = data.token_features_from[n + 1];
    const largest = data.token_values[first] || 1;
    const isSpecial = tokens[n].classList.contains("special");
    const items = [];
    for (let i = first; i < last; i++) {
      items.push(make("li", {}, featureLink(model, data.token_features[i]),
        make("i", { style: `--w:${data.token_values[i] / largest}` }), make("span", { class: "value" }, short(data.token_values[i]))));
    }
    panel.replaceChildren(
      make("h2", {}, token(tokens[n].textContent), make("small", {}, isSpecial ? "special token, not measured" : `${last - first} features`)),
      make("ol", { class: "near with-bars" }, ...items));
  }

  fill();
}
