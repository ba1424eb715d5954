// The numbers of the page, as packing.py packed them: { title, words, ..., firings: Uint32Array, ... }
async function unpack(base64) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser is too old for this page: it cannot decompress data.");
  }
  const compressed = Uint8Array.from(atob(base64), character => character.charCodeAt(0));
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const headerSize = new DataView(buffer).getUint32(0, true);
  const data = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, headerSize)));
  const types = { Uint8Array, Uint16Array, Uint32Array, Int32Array, Float32Array };
  for (const [name, [type, start, length]] of Object.entries(data.arrays)) {
    data[name] = new types[type](buffer, 4 + headerSize + start, length);
  }
  return data;
}
