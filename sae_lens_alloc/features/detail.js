// One feature: figures, histogram, logit lens, nearest features and example texts.
const TOKENS_BEFORE = 24, TOKENS_AFTER = 12;
const BANDS = ["Largest activations", "Upper quarter", "Second quarter", "Third quarter", "Lowest quarter"];

function showFeature(model, row, place, beside) {
  const { data } = model;
  const link = (step, text, label) => {
    const other = beside(step);
    return other === undefined
      ? make("span", { class: "button off", "aria-hidden": "true" }, text)
      : make("a", { class: "button", href: `#f${model.number(other)}`, "aria-label": label, title: label }, text);
  };
  const parts = [
    make("div", { class: "bar" },
      make("a", { class: "back button", href: "#features" }, "← All features"),
      make("h2", { tabindex: "-1", id: "feature-name" }, `Feature ${model.number(row)}`,
        model.isDead(row) ? make("span", { class: "tag" }, "dead") : model.isRare(row) ? make("span", { class: "tag" }, "rare") : null),
      make("span", { class: "steps" }, link(-1, "←", "Previous feature of the list"), link(1, "→", "Next feature of the list"))),
    make("section", { class: "summary" }, figures(model, row),
      model.isDead(row) ? make("p", { class: "muted" }, "It is active on no token of this text.") : histogram(model, row)),
    ...examples(model, row, [0]),
    data.no_lens ? make("p", { class: "muted" }, data.no_lens) : lens(model, row),
    neighbours(model, row),
    ...examples(model, row, [1, 2, 3, 4]),
  ];
  place.replaceChildren(...parts.filter(part => part !== null));
}

function figures(model, row) {
  const { data } = model;
  const shown = [
    ["density", percent(model.density(row)), `${number(data.firings[row])} of ${number(data.n_tokens)} tokens`],
    ["largest activation", short(model.largest(row)), `mean where active ${short(data.means[row])}`],
    ["decoder norm", short(data.norms[row]), null],
  ];
  if (data.promoted) shown.push(["logit effect", short(model.effect(row)), "largest, per unit of activation"]);
  return make("dl", { class: "figures" }, ...shown.map(([name, value, more]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, make("b", {}, value), more ? make("small", {}, more) : null))));
}

function histogram(model, row) {
  const counts = Array.from(model.histogram(row)), most = Math.max(...counts);
  const largest = model.largest(row), median = model.quantiles(row)[2];
  const bars = counts.map((count, i) => make("i", {
    style: `height:${count ? Math.max(2, 100 * count / most) : 0}%`,
    title: `${short(largest * i / counts.length)} to ${short(largest * (i + 1) / counts.length)}: ${number(count)} tokens`,
  }));
  return make("figure", {},
    make("figcaption", {}, "activations, by number of tokens"),
    make("div", { class: "histogram", role: "img", "aria-label": `Histogram of ${number(model.data.firings[row])} activations from 0 to ${short(largest)}; half of them are below ${short(median)}.` }, ...bars),
    make("div", { class: "axis", "aria-hidden": "true", style: `--median:${(100 * median / largest).toFixed(1)}%` },
      make("span", {}, "0"), make("span", { class: "median" }, `median ${short(median)}`), make("span", {}, short(largest))));
}

function lens(model, row) {
  const ends = { promoted: "Promoted next tokens", suppressed: "Suppressed next tokens" };
  const most = Math.max(...Object.keys(ends).flatMap(end => model.lens(row, end).map(({ effect }) => Math.abs(effect))), 1e-9);
  return make("section", {}, make("h3", {}, "Logit lens", make("small", {}, "what one unit of activation adds to the logits by itself, against the average token")),
    make("div", { class: "pair" }, ...Object.entries(ends).map(([end, title]) =>
      make("div", {}, make("h4", {}, title), make("ol", { class: `bars ${end}` }, ...model.lens(row, end).map(({ word, effect }) =>
        make("li", {}, token(word), make("i", { style: `--w:${Math.abs(effect) / most}` }), make("span", { class: "value" }, effect.toFixed(2).replace("-", "−")))))))));
}

function neighbours(model, row) {
  const kinds = {
    decoder: ["By decoder", "Cosine of the decoder directions"],
    activity: ["By co-activation", "Tokens on which both are active, over tokens on which at least one is"],
  };
  return make("section", {}, make("h3", {}, "Nearest features"),
    make("div", { class: "pair" }, ...Object.entries(kinds).map(([kind, [title, meaning]]) => {
      const found = model.near(row, kind);
      return make("div", {}, make("h4", { title: meaning }, title),
        found.length === 0 ? make("p", { class: "muted" }, "None.") : make("ol", { class: "near" }, ...found.map(({ feature, nearness }) =>
          make("li", {}, featureLink(model, feature), make("span", { class: "value" }, nearness.toFixed(2))))));
    })));
}

// A link to a feature, with what it is most active on; only its number where the page lacks it.
function featureLink(model, feature) {
  const row = model.rowOf.get(feature);
  if (row === undefined) return make("span", { class: "to muted" }, make("span", { class: "number" }, String(feature)), "not on this page");
  const peaks = model.peaks(row);
  return make("a", { class: "to", href: `#f${feature}` }, make("span", { class: "number" }, String(feature)),
    make("span", { class: "peaks" }, ...(peaks.length ? peaks.map(token) : [make("span", { class: "muted" }, "dead")])));
}

function examples(model, row, bands) {
  const found = model.examples(row), edges = model.quantiles(row);
  return bands.map(band => {
    const texts = found.filter(example => example.band === band), title = BANDS[band];
    if (texts.length === 0) return null;
    const range = band ? `${short(edges[5 - band])} to ${short(edges[4 - band])}` : null;
    return make("section", { class: "examples" },
      make("h3", {}, title, range ? make("small", {}, range) : null),
      ...texts.map(example => exampleText(model, example)));
  });
}

// The text around a token. Choosing it shows the whole context.
function exampleText(model, example) {
  const line = make("div", { class: "example" });
  const draw = isWhole => {
    const start = isWhole ? 0 : Math.max(0, example.position - TOKENS_BEFORE);
    const stop = isWhole ? model.data.length : Math.min(model.data.length, example.position + TOKENS_AFTER + 1);
    line.replaceChildren(
      make("span", { class: "value" }, short(example.value)),
      colouredText(model, example, start, stop, isWhole),
      make("button", {
        type: "button", class: "more", "aria-expanded": String(isWhole), title: isWhole ? "Show less of the text" : "Show the whole context",
        "aria-label": isWhole ? "Show less of the text" : "Show the whole context",
        onclick: () => { draw(!isWhole); line.querySelector("button").focus(); },
      }, isWhole ? "−" : "+"));
  };
  draw(false);
  return line;
}

function colouredText(model, { textRow, position, shades }, start, stop, isWhole) {
  const { data } = model;
  const spans = [];
  for (let i = start; i < stop; i++) {
    const word = model.wordAt(textRow, i), shade = shades.get(i);
    const text = data.words[word];
    const shown = isWhole ? text : text.replace(/\s*\n\s*/g, " ↵ ").replace(/ {3,}/g, "  ");
    if (model.special.has(word)) spans.push(make("span", { class: "special" }, shown));
    else if (shade === undefined) spans.push(shown);
    else spans.push(make("mark", { class: i === position ? "peak" : null, style: `--a:${shade.toFixed(3)}`, title: `${percent(shade)} of its largest activation` }, shown));
  }
  return make("span", { class: `text${isWhole ? " whole" : ""}` }, start > 0 ? "…" : null, ...spans, stop < data.length ? "…" : null);
}
