// The list of features: search, order, filter, and rows that exist only while they can be seen.
const ROW_HEIGHT = 38;
const SPARE_ROWS = 8;

function makeList(model, open) {
  const { data } = model;
  const rows = document.getElementById("rows"), all = document.getElementById("rows-all");
  const search = document.getElementById("search"), sort = document.getElementById("sort");
  const reverse = document.getElementById("reverse"), filter = document.getElementById("filter");
  const orders = {
    density: ["density", row => data.firings[row], row => percent(model.density(row))],
    largest: ["largest activation", model.largest, row => short(model.largest(row))],
    effect: ["logit effect", model.effect, row => short(model.effect(row))],
    norm: ["decoder norm", row => data.norms[row], row => short(data.norms[row])],
    number: ["number", row => -model.number(row), row => percent(model.density(row))],
  };
  if (!data.promoted) delete orders.effect;
  const filters = {
    all: ["all", () => true, "All features shown here"],
    alive: ["active", row => !model.isDead(row), "Active on at least one token of this text"],
    rare: ["rare", model.isRare, `Active on less than ${number(data.rare_density * 1e4)} in 10,000 tokens, dead ones included`],
    dead: ["dead", model.isDead, "Active on no token of this text"],
  };
  const state = { rows: [], at: 0, falling: true, filter: "all", opened: -1 };
  const haystacks = new Array(model.n);
  const everyRow = Array.from({ length: model.n }, (_, row) => row);

  for (const [key, [name]] of Object.entries(orders)) sort.append(make("option", { value: key }, name));
  for (const [key, [name, test, title]] of Object.entries(filters)) {
    filter.append(make("label", { title },
      make("input", { type: "radio", name: "filter", value: key, checked: key === "all" ? "" : null }),
      make("span", {}, `${name} `, make("b", {}, number(everyRow.filter(test).length)))));
  }

  function haystack(row) {
    if (haystacks[row] === undefined) {
      const words = [...model.peaks(row)];
      if (data.promoted) words.push(...model.lens(row, "promoted").map(({ word }) => word));
      haystacks[row] = words.join("\n").toLowerCase();
    }
    return haystacks[row];
  }

  // by a number, a range of numbers, or a part of a token
  function matching(query) {
    const range = query.match(/^(\d+)\s*-\s*(\d+)$/);
    if (range) return row => model.number(row) >= +range[1] && model.number(row) <= +range[2];
    if (/^#?\d+$/.test(query) && model.rowOf.has(+query.replace("#", ""))) {
      return row => model.number(row) === +query.replace("#", "");
    }
    return query ? row => haystack(row).includes(query) : () => true;
  }

  function update() {
    const [, value] = orders[sort.value], test = filters[state.filter][1];
    const matches = matching(search.value.trim().toLowerCase());
    const sign = state.falling ? 1 : -1;
    state.rows = everyRow.filter(row => test(row) && matches(row))
      .sort((a, b) => sign * (value(b) - value(a)) || a - b);
    state.at = Math.max(0, state.rows.indexOf(state.opened));
    document.getElementById("value-name").textContent = sort.value === "number" ? "density" : orders[sort.value][0];
    document.getElementById("found").textContent =
      state.rows.length === model.n ? "" : `${number(state.rows.length)} of ${number(model.n)} features`;
    all.style.height = `${state.rows.length * ROW_HEIGHT}px`;
    rows.scrollTop = 0;
    draw();
  }

  // where a search found a token that the row does not show: one that the feature promotes
  function promotedMatch(row) {
    const query = search.value.trim().toLowerCase();
    const holds = word => word.toLowerCase().includes(query);
    if (!query || !data.promoted || model.peaks(row).some(holds)) return null;
    const found = model.lens(row, "promoted").find(({ word }) => holds(word));
    return found ? make("span", { class: "promotes", title: "A next token that it promotes" }, "→ ", token(found.word)) : null;
  }

  function draw() {
    const first = Math.max(0, Math.floor(rows.scrollTop / ROW_HEIGHT) - SPARE_ROWS);
    const last = Math.min(state.rows.length, Math.ceil((rows.scrollTop + rows.clientHeight) / ROW_HEIGHT) + SPARE_ROWS);
    const text = orders[sort.value][2];
    const drawn = [];
    for (let i = first; i < last; i++) {
      const row = state.rows[i];
      const kind = model.isDead(row) ? "dead" : null;
      const words = make("span", { class: "peaks" }, ...model.peaks(row).map(token), kind ? "dead" : null, promotedMatch(row));
      drawn.push(make("div", {
        class: `feature${kind ? " dead" : ""}${i === state.at ? " at" : ""}`, id: `row-${i}`, role: "option",
        "aria-selected": String(row === state.opened), "aria-setsize": state.rows.length, "aria-posinset": i + 1,
        style: `top:${i * ROW_HEIGHT}px`, onclick: () => { state.at = i; open(row); },
      }, make("span", { class: "number" }, String(model.number(row))), words, make("span", { class: "value" }, text(row))));
    }
    if (state.rows.length === 0) drawn.push(make("p", { class: "muted none" }, "No feature matches."));
    all.replaceChildren(...drawn);
    rows.setAttribute("aria-activedescendant", state.rows.length ? `row-${state.at}` : "");
  }

  function goTo(i) {
    state.at = Math.max(0, Math.min(state.rows.length - 1, i));
    const top = state.at * ROW_HEIGHT;
    if (top < rows.scrollTop) rows.scrollTop = top;
    if (top + ROW_HEIGHT > rows.scrollTop + rows.clientHeight) rows.scrollTop = top + ROW_HEIGHT - rows.clientHeight;
    draw();
  }

  function openAt(i) {
    if (state.rows[i] !== undefined) open(state.rows[i]);
  }

  rows.addEventListener("keydown", event => {
    const page = Math.max(1, Math.floor(rows.clientHeight / ROW_HEIGHT) - 1);
    const moves = { ArrowDown: state.at + 1, ArrowUp: state.at - 1, PageDown: state.at + page, PageUp: state.at - page, Home: 0, End: state.rows.length - 1 };
    if (event.key in moves) goTo(moves[event.key]);
    else if (event.key === "Enter" || event.key === " ") openAt(state.at);
    else return;
    event.preventDefault();
  });
  search.addEventListener("keydown", event => {
    if (event.key === "ArrowDown") rows.focus();
    else if (event.key === "Enter") openAt(state.at);
    else return;
    event.preventDefault();
  });
  rows.addEventListener("scroll", draw, { passive: true });
  window.addEventListener("resize", draw);
  search.addEventListener("input", update);
  sort.addEventListener("change", update);
  filter.addEventListener("change", event => { state.filter = event.target.value; update(); });
  reverse.addEventListener("click", () => {
    state.falling = !state.falling;
    reverse.firstElementChild.textContent = state.falling ? "↓" : "↑";
    update();
  });
  update();

  return {
    first: () => state.rows[0],
    show(row) {
      state.opened = row;
      const i = state.rows.indexOf(row);
      if (i >= 0) goTo(i); else draw();
    },
    // the row that comes `step` after the opened one, if any
    beside: step => state.rows[state.rows.indexOf(state.opened) + step],
    draw,
    focus: () => rows.focus({ preventScroll: true }),
    focusSearch: () => search.focus(),
  };
}
