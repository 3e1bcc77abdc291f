// What is seen, as a file: PNG, SVG and CSV.

import {h} from './ui.js';

/**
 * Put a menu into a card's tools. name: of the file. canvas: a `figure`, or `svg()` and `png()` of its own. rows(): the numbers, the
 * first row being the columns' names.
 */
export function exportable(card, {name, canvas, svg, png, rows}) {
  const kinds = [
    ['PNG', canvas ? () => canvas.figure.png() : png, 'image/png'],
    ['SVG', canvas ? async () => canvas.figure.svg() : svg, 'image/svg+xml'],
    ['CSV', rows && (async () => csv(rows())), 'text/csv'],
  ].filter(([, make]) => make);
  card.tools.append(h('span.exports', {role: 'group', 'aria-label': `Save ${name}`}, kinds.map(([kind, make, type]) =>
    h('button.small', {type: 'button', title: `Save as ${kind}`, 'data-export': kind.toLowerCase(),
      onclick: async () => save(await make(), type, `${name}.${kind.toLowerCase()}`)}, kind))));
}

/** Rows of texts and numbers as CSV (RFC 4180). What a spreadsheet would take for a formula stays text. */
export function csv(rows) {
  const cell = value => {
    if (typeof value === 'number') return Number.isNaN(value) ? '' : String(value);
    const text = String(value ?? '');
    const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return `${rows.map(row => row.map(cell).join(',')).join('\r\n')}\r\n`;
}

function save(content, type, name) {
  const address = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], {type}));
  h('a', {href: address, download: name.replace(/[^\p{L}\p{N}._-]+/gu, '-')}).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
