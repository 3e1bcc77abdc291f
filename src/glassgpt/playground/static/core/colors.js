// Colors that color-blind readers can distinguish: Okabe and Ito's eight for categories, one or two hues for scales.

const darkSystem = matchMedia('(prefers-color-scheme: dark)');
let chosen = null;
export const isDark = () => document.documentElement.dataset.theme === 'dark';
// Call `listener` when the page turns dark or light, until `signal` aborts.
export const onTheme = (listener, signal) => addEventListener('themechange', listener, {signal});

// Set the theme to 'dark', 'light', or the system's (null).
export function setTheme(theme) {
  chosen = theme;
  document.documentElement.dataset.theme = chosen ?? (darkSystem.matches ? 'dark' : 'light');
  dispatchEvent(new Event('themechange'));
}
darkSystem.addEventListener('change', () => setTheme(chosen));

// The value of a color of the style sheet: ink, soft, line, page, card, ground, accent, warm.
export const css = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
// The same as [r, g, b].
export const rgb = name => [1, 3, 5].map(i => parseInt(css(name).slice(i, i + 2), 16));

const CATEGORIES = {
  light: ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#8a6d00', '#3a8fc4', '#7a4b9a', '#555555'],
  dark: ['#56b4e9', '#e69f00', '#2fc79a', '#e59cc4', '#f0e442', '#9ccbe8', '#c3a0e0', '#bbbbbb'],
};
// Stops from 0 to 1. Zero is close to the page's background.
const SCALES = {
  magnitude: {
    light: [[255, 255, 255], [198, 219, 239], [107, 174, 214], [33, 113, 181], [8, 48, 107]],
    dark: [[22, 27, 34], [18, 62, 105], [31, 111, 172], [99, 180, 232], [226, 244, 255]],
  },
  signed: {
    light: [[0, 90, 148], [118, 178, 214], [250, 250, 250], [240, 172, 118], [190, 78, 0]],
    dark: [[120, 196, 246], [30, 96, 146], [28, 33, 41], [146, 76, 18], [255, 158, 80]],
  },
};
const theme = () => (isDark() ? 'dark' : 'light');
// The color of the i-th category.
export const category = i => CATEGORIES[theme()][i % 8];
// The color of a signed number: blue below 0, orange from 0 on.
export const signColor = x => category(x < 0 ? 0 : 1);
const tables = new Map();

// A scale's 256 colors as [r, g, b]. scale: 'magnitude', or 'signed' (0 in the middle).
export function colorTable(scale) {
  const key = `${scale} ${theme()}`;
  if (!tables.has(key)) {
    const stops = SCALES[scale][theme()];
    tables.set(key, Array.from({length: 256}, (_, i) => {
      const place = i / 255 * (stops.length - 1), k = Math.min(stops.length - 2, Math.floor(place));
      return stops[k].map((low, c) => Math.round(low + (stops[k + 1][c] - low) * (place - k)));
    }));
  }
  return tables.get(key);
}

const entryAt = (scale, share) => colorTable(scale)[Math.round(255 * Math.min(1, Math.max(0, share || 0)))];
// The CSS color at a share from 0 to 1 of a scale.
export const shade = (scale, share) => `rgb(${entryAt(scale, share).join(' ')})`;

// Black or white, whichever is easier to read on that color.
export function inkOn(scale, share) {
  const [r, g, b] = entryAt(scale, share);
  return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? '#111' : '#fff';
}
