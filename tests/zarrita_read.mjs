// Reads Zarr arrays with zarrita: prints shape, type, sum, largest value, and where the values that are not 0 lie.
// node zarrita_read.mjs FOLDER|URL...
import * as zarr from 'zarrita';
import FileSystemStore from '@zarrita/storage/fs';

const facts = [];
for (const place of process.argv.slice(2)) {
  const store = place.startsWith('http') ? new zarr.FetchStore(place) : new FileSystemStore(place);
  const array = await zarr.open(store, { kind: 'array' });
  const { data, shape, stride } = await zarr.get(array);
  let sum = 0;
  let max = 0;
  const low = shape.map(() => Infinity);
  const high = shape.map(() => 0);
  for (let i = 0; i < data.length; i++) {
    const value = Number(data[i]);
    sum += value;
    max = Math.max(max, value);
    if (!value) continue;
    let rest = i;
    shape.forEach((_, axis) => {
      const at = Math.floor(rest / stride[axis]);
      rest -= at * stride[axis];
      low[axis] = Math.min(low[axis], at);
      high[axis] = Math.max(high[axis], at + 1);
    });
  }
  facts.push({ dtype: array.dtype, shape, sum, max, box: low.map((n, axis) => [n, high[axis]]) });
}
console.log(JSON.stringify(facts));
