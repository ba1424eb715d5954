// What the page asks of the data. A feature is meant by its row; its number is features[row].
const N_QUANTILES = 5;
const N_PEAKS = 3;

function makeModel(data) {
  const n = data.features.length;
  const rowOf = new Map();
  data.features.forEach((feature, row) => rowOf.set(feature, row));
  const nLens = data.promoted ? data.promoted.length / n : 0;
  const nNear = data.near_by_decoder.length / n;
  const nTogether = data.near_by_activity.length / n;
  const nBins = data.histograms.length / n;
  const special = new Set(data.special_words);
  const most = new Array(n);

  const model = {
    data, n, nBins, rowOf, special,
    number: row => data.features[row],
    density: row => data.firings[row] / data.n_tokens,
    largest: row => data.quantiles[row * N_QUANTILES + N_QUANTILES - 1],
    quantiles: row => data.quantiles.subarray(row * N_QUANTILES, (row + 1) * N_QUANTILES),
    histogram: row => data.histograms.subarray(row * nBins, (row + 1) * nBins),
    effect: row => nLens ? Math.max(data.promoted_effects[row * nLens], -data.suppressed_effects[row * nLens]) : 0,
    isDead: row => data.firings[row] === 0,
    isRare: row => model.density(row) < data.rare_density,

    // [{ word, effect }], the strongest first
    lens(row, end) {
      const words = data[end], effects = data[`${end}_effects`];
      return Array.from({ length: nLens }, (_, i) => ({
        word: data.words[words[row * nLens + i]], effect: effects[row * nLens + i],
      }));
    },

    // [{ feature, nearness }], the nearest first
    near(row, kind) {
      const [features, nearness, k] = kind === "decoder"
        ? [data.near_by_decoder, data.cosines, nNear]
        : [data.near_by_activity, data.overlaps, nTogether];
      const found = [];
      for (let i = row * k; i < (row + 1) * k; i++) {
        if (features[i] >= 0) found.push({ feature: features[i], nearness: nearness[i] });
      }
      return found;
    },

    // Up to three different tokens that the feature is most active on.
    peaks(row) {
      if (!most[row]) {
        const words = new Set();
        for (let i = data.examples_from[row]; i < data.examples_from[row + 1] && words.size < N_PEAKS; i++) {
          if (data.example_bands[i] === 0) words.add(model.characterAt(data.example_rows[i], data.example_positions[i]));
        }
        most[row] = [...words];
      }
      return most[row];
    },

    wordAt: (textRow, position) => data.text[textRow * data.length + position],

    // The text of a token. Of several tokens that are one character, the first has the text.
    characterAt(textRow, position) {
      while (position > 0 && data.words[model.wordAt(textRow, position)] === "") position--;
      return data.words[model.wordAt(textRow, position)];
    },

    // [{ textRow, position, band, value, shades }], with the shade of each position of the context
    examples(row) {
      const found = [];
      for (let i = data.examples_from[row]; i < data.examples_from[row + 1]; i++) {
        const shades = new Map();
        for (let j = data.active_from[i]; j < data.active_from[i + 1]; j++) {
          shades.set(data.active_positions[j], data.active_shades[j] / data.n_shades);
        }
        found.push({
          textRow: data.example_rows[i], position: data.example_positions[i],
          band: data.example_bands[i], value: data.example_values[i], shades,
        });
      }
      return found;
    },
  };
  return model;
}

// A token as something to read: blanks and ends of lines made visible.
function visible(word) {
  if (word === "") return "∅";
  return word.replace(/\r/g, "").replace(/\n/g, "↵").replace(/\t/g, "⇥")
    .replace(/ {3,}/g, blanks => `␣×${blanks.length}`)
    .replace(/^ (?=\S)/, "·")
    .replace(/ /g, "␣");
}

function percent(share) {
  if (share === 0) return "0";
  const value = 100 * share;
  return `${value >= 10 ? value.toFixed(0) : value >= 0.1 ? value.toFixed(1) : value.toPrecision(1)}%`;
}

const number = value => value.toLocaleString("en-US");
const short = value => value === 0 ? "0" : Math.abs(value) >= 1000 ? number(Math.round(value)) : value.toPrecision(3);

// An element: make("p", { class: "muted" }, "text", other)
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

const token = word => make("code", { class: "word" }, visible(word));
