// One way to paint a figure, on a canvas or as SVG: what is seen is what is exported.

import {css, onTheme} from './colors.js';

const FONT = 'system-ui, sans-serif';
const MONO = 'ui-monospace, "DejaVu Sans Mono", monospace';

/** Paints on a canvas. */
export class CanvasPaint {
  constructor(context) {
    this.context = context;
  }

  rect(x, y, width, height, fill) {
    this.context.fillStyle = fill;
    this.context.fillRect(x, y, width, height);
  }

  frame(x, y, width, height, stroke, thickness = 1) {
    this.context.strokeStyle = stroke;
    this.context.lineWidth = thickness;
    this.context.strokeRect(x, y, width, height);
  }

  line(x1, y1, x2, y2, stroke, thickness = 1) {
    this.context.strokeStyle = stroke;
    this.context.lineWidth = thickness;
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

  /** `align`: start, center, end. `turn`: degrees around (x, y). The text's middle is at y. */
  text(x, y, string, {fill, size = 12, align = 'start', bold = false, mono = false, turn = 0, most = Infinity} = {}) {
    const c = this.context;
    c.save();
    c.translate(x, y);
    if (turn) c.rotate(turn * Math.PI / 180);
    c.font = `${bold ? '600 ' : ''}${size}px ${mono ? MONO : FONT}`;
    c.fillStyle = fill ?? css('ink');
    c.textAlign = align;
    c.textBaseline = 'middle';
    c.fillText(fitted(string, most, size), 0, 0);
    c.restore();
  }

  /** An ImageData, stretched without smoothing: its pixels are cells. */
  image(x, y, width, height, pixels) {
    const aside = new OffscreenCanvas(pixels.width, pixels.height);
    aside.getContext('2d').putImageData(pixels, 0, 0);
    this.context.imageSmoothingEnabled = false;
    this.context.drawImage(aside, x, y, width, height);
  }
}

/** Paints as SVG. */
export class SvgPaint {
  constructor(width, height) {
    this.width = width;
    this.height = height;
    this.parts = [];
  }

  rect(x, y, width, height, fill) {
    this.parts.push(`<rect x="${x}" y="${y}" width="${width}" height="${height}" fill="${fill}"/>`);
  }

  frame(x, y, width, height, stroke, thickness = 1) {
    this.parts.push(`<rect x="${x}" y="${y}" width="${width}" height="${height}" fill="none" stroke="${stroke}" stroke-width="${thickness}"/>`);
  }

  line(x1, y1, x2, y2, stroke, thickness = 1) {
    this.parts.push(`<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}" stroke="${stroke}" stroke-width="${thickness}"/>`);
  }

  dot(x, y, radius, fill) {
    this.parts.push(`<circle cx="${x}" cy="${y}" r="${radius}" fill="${fill}"/>`);
  }

  text(x, y, string, {fill, size = 12, align = 'start', bold = false, mono = false, turn = 0, most = Infinity} = {}) {
    const anchor = {start: 'start', center: 'middle', end: 'end'}[align];
    const turned = turn ? ` transform="rotate(${turn} ${x} ${y})"` : '';
    this.parts.push(`<text x="${x}" y="${y}" fill="${fill ?? css('ink')}" font-size="${size}" font-family='${mono ? MONO : FONT}'`
      + `${bold ? ' font-weight="600"' : ''} text-anchor="${anchor}" dominant-baseline="central" xml:space="preserve"${turned}>`
      + `${escaped(fitted(string, most, size))}</text>`);
  }

  image(x, y, width, height, pixels) {
    const aside = Object.assign(document.createElement('canvas'), {width: pixels.width, height: pixels.height});
    aside.getContext('2d').putImageData(pixels, 0, 0);
    this.parts.push(`<image x="${x}" y="${y}" width="${width}" height="${height}" preserveAspectRatio="none" `
      + `style="image-rendering:pixelated" href="${aside.toDataURL()}"/>`);
  }

  toString() {
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${this.width}" height="${this.height}" `
      + `viewBox="0 0 ${this.width} ${this.height}">${this.parts.join('')}</svg>`;
  }
}

// XML knows no control characters at all, not even escaped ones.
const escaped = text => text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, '\ufffd')
  .replace(/[&<>"]/g, c => ({'&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;'})[c]);

/** Text cut to about `most` pixels. */
function fitted(text, most, size) {
  const characters = [...String(text)];
  const room = Math.max(1, Math.floor(most / (0.62 * size)));
  return characters.length <= room ? String(text) : `${characters.slice(0, room - 1).join('')}…`;
}

/**
 * A figure: a canvas that is painted anew when its width or the theme changes.
 *
 * size(width): its height for a width, in CSS pixels. paint(p, width, height). label: what a screen reader says.
 * The element's `figure` has `redraw()`, `png()` (a Blob) and `svg()` (text).
 */
export function figure({size, paint, label, signal}) {
  const canvas = document.createElement('canvas');
  canvas.className = 'figure';
  canvas.setAttribute('role', 'img');
  canvas.setAttribute('aria-label', label);
  let width = 0, height = 0;

  function redraw() {
    if (!width) return;
    height = size(width);
    canvas.style.height = `${height}px`;
    const scale = devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
    const context = canvas.getContext('2d');
    context.scale(scale, scale);
    paint(new CanvasPaint(context), width, height);
  }

  const observer = new ResizeObserver(() => {
    const now = Math.floor(canvas.parentElement?.clientWidth ? canvas.clientWidth : 0);
    if (now && now !== width) {
      width = now;
      redraw();
    }
  });
  observer.observe(canvas);
  onTheme(redraw, signal);
  signal?.addEventListener('abort', () => observer.disconnect());
  canvas.figure = {redraw, ...pictured(() => [width, height], paint)};
  return canvas;
}

/** What `paint(p, width, height)` paints as files on the cards' ground: `png()` (a Blob) and `svg()` (text). size(): [width, height]. */
export function pictured(size, paint) {
  return {
    async png() {
      const [width, height] = size();
      const canvas = new OffscreenCanvas(2 * width, 2 * height);
      const context = canvas.getContext('2d');
      context.scale(2, 2);
      context.fillStyle = css('card');
      context.fillRect(0, 0, width, height);
      paint(new CanvasPaint(context), width, height);
      return canvas.convertToBlob();
    },
    svg() {
      const [width, height] = size();
      const p = new SvgPaint(width, height);
      p.rect(0, 0, width, height, css('card'));
      paint(p, width, height);
      return String(p);
    },
  };
}
