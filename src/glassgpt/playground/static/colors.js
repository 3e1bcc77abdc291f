// Colours that colour-blind eyes can tell apart: Okabe and Ito's eight for names, one hue for sizes, blue to vermillion for signs.

const dark = matchMedia('(prefers-color-scheme: dark)');

/** Whether the page is dark now: by the button's choice, else by the system's. */
export const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? 'dark' : 'light')) === 'dark';

/** Call `listener` when the page turns dark or light, until `signal` aborts. */
export function onTheme(listener, signal) {
  addEventListener('themechange', listener, {signal});
  dark.addEventListener('change', listener, {signal});
}

/** Let the page be 'dark', 'light', or as the system is (null). */
export function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  dispatchEvent(new Event('themechange'));
}

/** The value of a colour of the style sheet: ink, soft, line, page, card, accent, warm. */
export const css = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** The same as [r, g, b], for pixels. */
export const rgb = name => [1, 3, 5].map(i => parseInt(css(name).slice(i, i + 2), 16));

const NAMES = {
  light: ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#8a6d00', '#3a8fc4', '#7a4b9a', '#555555'],
  dark: ['#56b4e9', '#e69f00', '#2fc79a', '#e59cc4', '#f0e442', '#9ccbe8', '#c3a0e0', '#bbbbbb'],
};

/** The colour of the i-th of several things. */
export const named = i => NAMES[isDark() ? 'dark' : 'light'][i % 8];

// Stops from 0 to 1: from the page's own ground to the strongest, so that nothing is what is not drawn.
const SIZES = {
  light: [[255, 255, 255], [198, 219, 239], [107, 174, 214], [33, 113, 181], [8, 48, 107]],
  dark: [[22, 27, 34], [18, 62, 105], [31, 111, 172], [99, 180, 232], [226, 244, 255]],
};
const SIGNS = {
  light: [[0, 90, 148], [118, 178, 214], [250, 250, 250], [240, 172, 118], [190, 78, 0]],
  dark: [[120, 196, 246], [30, 96, 146], [28, 33, 41], [146, 76, 18], [255, 158, 80]],
};

function between(stops, share) {
  const place = Math.min(1, Math.max(0, share)) * (stops.length - 1);
  const i = Math.min(stops.length - 2, Math.floor(place));
  return stops[i].map((low, c) => Math.round(low + (stops[i + 1][c] - low) * (place - i)));
}

const tables = new Map();

/** 256 colours as [r, g, b], for values from 0 to 255: 'sizes' or 'signs' (whose middle is 0). */
export function table(kind) {
  const key = `${kind} ${isDark()}`;
  if (!tables.has(key)) {
    const stops = (kind === 'signs' ? SIGNS : SIZES)[isDark() ? 'dark' : 'light'];
    tables.set(key, Array.from({length: 256}, (_, i) => between(stops, i / 255)));
  }
  return tables.get(key);
}

/** The CSS colour of a share from 0 to 1 of a table's range. */
export function shade(kind, share) {
  const rgb = table(kind)[Math.round(255 * Math.min(1, Math.max(0, share || 0)))];
  return `rgb(${rgb.join(' ')})`;
}

/** Black or white, whichever is easier to read on that share's colour. */
export function inkOn(kind, share) {
  const [r, g, b] = table(kind)[Math.round(255 * Math.min(1, Math.max(0, share || 0)))];
  return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? '#111' : '#fff';
}
