// Painting on a canvas or as SVG by the same calls, so that an exported picture is what the page shows.
import {css} from './colors.js';

const FONT = 'system-ui, sans-serif';
const MONO = 'ui-monospace, "DejaVu Sans Mono", monospace';

export class CanvasPainter {
  constructor(context) { this.context = context; }
  rect(x, y, width, height, fill) {
    this.context.fillStyle = fill;
    this.context.fillRect(x, y, width, height);
  }
  frame(x, y, width, height, stroke, thickness = 1) {
    Object.assign(this.context, {strokeStyle: stroke, lineWidth: thickness});
    this.context.strokeRect(x, y, width, height);
  }
  line(x1, y1, x2, y2, stroke, thickness = 1) {
    Object.assign(this.context, {strokeStyle: stroke, lineWidth: thickness});
    this.context.beginPath();
    this.context.moveTo(x1, y1);
    this.context.lineTo(x2, y2);
    this.context.stroke();
  }
  dot(x, y, radius, fill) {
    this.context.fillStyle = fill;
    this.context.beginPath();
    this.context.arc(x, y, radius, 0, 2 * Math.PI);
    this.context.fill();
  }
  // Text whose vertical middle is at y. align: start, center or end; turn: degrees around (x, y); room: pixels.
  text(x, y, string, {fill, size = 12, align = 'start', bold = false, mono = false, turn = 0, room = Infinity} = {}) {
    const c = this.context;
    c.save();
    c.translate(x, y);
    c.rotate(turn * Math.PI / 180);
    c.font = `${bold ? '600 ' : ''}${size}px ${mono ? MONO : FONT}`;
    Object.assign(c, {fillStyle: fill ?? css('ink'), textAlign: align, textBaseline: 'middle'});
    c.fillText(shortened(string, room, size), 0, 0);
    c.restore();
  }
  // An ImageData, stretched without smoothing: each pixel becomes a cell.
  image(x, y, width, height, pixels) {
    this.context.imageSmoothingEnabled = false;
    this.context.drawImage(canvasOf(pixels), x, y, width, height);
  }
}

export class SvgPainter {
  constructor(width, height) {
    this.size = `width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"`;
    this.parts = [];
  }
  rect(x, y, width, height, fill, more = '') {
    this.parts.push(`<rect x="${x}" y="${y}" width="${width}" height="${height}" fill="${fill}"${more}/>`);
  }
  frame(x, y, width, height, stroke, thickness = 1) {
    this.rect(x, y, width, height, 'none', ` stroke="${stroke}" stroke-width="${thickness}"`);
  }
  line(x1, y1, x2, y2, stroke, thickness = 1) {
    this.parts.push(`<path d="M${x1} ${y1}L${x2} ${y2}" stroke="${stroke}" stroke-width="${thickness}"/>`);
  }
  dot(x, y, radius, fill) {
    this.parts.push(`<circle cx="${x}" cy="${y}" r="${radius}" fill="${fill}"/>`);
  }
  text(x, y, string, {fill, size = 12, align = 'start', bold = false, mono = false, turn = 0, room = Infinity} = {}) {
    const anchor = {start: 'start', center: 'middle', end: 'end'}[align];
    this.parts.push(`<text x="${x}" y="${y}" fill="${fill ?? css('ink')}" font-size="${size}" `
      + `font-family='${mono ? MONO : FONT}'${bold ? ' font-weight="600"' : ''} text-anchor="${anchor}" `
      + `dominant-baseline="central" xml:space="preserve"${turn ? ` transform="rotate(${turn} ${x} ${y})"` : ''}>`
      + `${escaped(shortened(string, room, size))}</text>`);
  }
  image(x, y, width, height, pixels) {
    this.parts.push(`<image x="${x}" y="${y}" width="${width}" height="${height}" preserveAspectRatio="none" `
      + `style="image-rendering:pixelated" href="${canvasOf(pixels).toDataURL()}"/>`);
  }
  toString() {
    return `<svg xmlns="http://www.w3.org/2000/svg" ${this.size}>${this.parts.join('')}</svg>`;
  }
}

function canvasOf(pixels) {
  if (pixels instanceof HTMLCanvasElement) return pixels;
  const canvas = Object.assign(document.createElement('canvas'), {width: pixels.width, height: pixels.height});
  canvas.getContext('2d').putImageData(pixels, 0, 0);
  return canvas;
}

// XML has no control characters, not even escaped ones.
const escaped = text => text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, '\ufffd')
  .replace(/[&<>"]/g, c => ({'&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;'})[c]);

// Shorten a text to about `room` pixels.
function shortened(text, room, size) {
  const characters = [...String(text)], fits = Math.max(1, Math.floor(room / (0.62 * size)));
  return characters.length <= fits ? String(text) : `${characters.slice(0, fits - 1).join('')}…`;
}

// The picture that `paint(p, width, height)` paints, as `png()` (a Blob) and `svg()` (text); null if its `size()`, which
// is [width, height], has a 0: it was not shown yet.
export function exportable(size, paint) {
  const onCard = (p, [width, height]) => {
    p.rect(0, 0, width, height, css('card'));
    paint(p, width, height);
    return p;
  };
  return {
    png() {
      const [width, height] = size();
      if (!(width && height)) return null;
      const canvas = new OffscreenCanvas(2 * width, 2 * height);
      canvas.getContext('2d').scale(2, 2);
      onCard(new CanvasPainter(canvas.getContext('2d')), [width, height]);
      return canvas.convertToBlob();
    },
    svg: () => (size().includes(0) ? null : String(onCard(new SvgPainter(...size()), size()))),
  };
}

// The picture of an element of boxes and texts, as the browser laid it out.
export function exportableElement(element) {
  return exportable(() => [element.clientWidth, element.scrollHeight], p => {
    const {left, top} = element.getBoundingClientRect();
    for (const part of element.querySelectorAll('*')) {
      const box = part.getBoundingClientRect(), style = getComputedStyle(part);
      const x = box.left - left, y = box.top - top + element.scrollTop;
      if (style.backgroundColor !== 'rgba(0, 0, 0, 0)') p.rect(x, y, box.width, box.height, style.backgroundColor);
      if (style.borderTopWidth !== '0px') p.frame(x, y, box.width, box.height, style.borderTopColor);
      if (part instanceof HTMLCanvasElement) p.image(x, y, box.width, box.height, part);
      for (const {text, place} of [...part.childNodes].flatMap(linesOf)) {
        p.text(place.left - left, (place.top + place.bottom) / 2 - top + element.scrollTop, text, {
          size: parseFloat(style.fontSize), bold: style.fontWeight >= 600, mono: style.fontFamily.includes('mono'),
          fill: style.color});
      }
    }
  });
}

// The lines of a text node, as the browser broke them, with their places.
function linesOf(node) {
  const lines = [], range = document.createRange();
  for (const {0: word, index} of node.nodeType === Node.TEXT_NODE ? node.data.matchAll(/\s*\S+/g) : []) {
    range.setStart(node, index + word.length - word.trimStart().length);
    range.setEnd(node, index + word.length);
    const place = range.getBoundingClientRect(), last = lines.at(-1);
    if (last && Math.abs(last.place.top - place.top) < 2) last.text += word;
    else if (place.width) lines.push({text: word.trimStart(), place});
  }
  return lines;
}
