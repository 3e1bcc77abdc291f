// Numbers as text.

// A count with thousands separators.
export const count = n => n.toLocaleString('en');
// A count of tokens: "1 token", "2,000 tokens".
export const tokenCount = n => `${count(n)} token${n === 1 ? '' : 's'}`;

// Three significant digits; very small and very large numbers as powers of ten.
export function short(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return '–';
  if (x === 0) return '0';
  const size = Math.abs(x);
  if (size >= 1e6 || size < 1e-3) return x.toExponential(1).replace('e+', 'e').replaceAll('-', '−');
  return (size >= 1000 ? count(Math.round(x)) : String(Number(x.toPrecision(3)))).replace('-', '−');
}

// Six significant digits, for comparing two numbers.
export function precise(x) {
  const size = Math.abs(x);
  const text = size && (size >= 1e6 || size < 1e-4) ? x.toExponential(3) : String(Number(x.toPrecision(6)));
  return text.replaceAll('-', '−').replace('e+', 'e');
}

// A probability in percent; null as a dash.
export function percent(p) {
  if (p === null) return '–';
  if (p >= 0.9995) return '100 %';
  if (p >= 0.0995) return `${(100 * p).toFixed(1)} %`;
  return p >= 0.000095 ? `${(100 * p).toFixed(2)} %` : `${(100 * p).toExponential(0).replace('-', '−')} %`;
}

// Seconds as hours, minutes and seconds.
export function duration(seconds) {
  const whole = Math.round(seconds), pad = n => String(n).padStart(2, '0');
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  if (hours) return `${hours}:${pad(minutes)}:${pad(whole % 60)} h`;
  return minutes ? `${minutes}:${pad(whole % 60)} min` : `${whole} s`;
}

// Quote a text for a POSIX shell.
export const shellQuoted = text =>
  (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll('\'', `'\\''`)}'`);

// Format rows of texts and numbers as CSV (RFC 4180). Text that a spreadsheet would run as a formula gets a quote.
export function csv(rows) {
  const cell = value => {
    if (typeof value === 'number') return Number.isNaN(value) ? '' : String(value);
    const text = String(value ?? '');
    const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return `${rows.map(row => row.map(cell).join(',')).join('\r\n')}\r\n`;
}
