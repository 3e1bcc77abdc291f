// Creating elements. Text from outside is only ever set as text, so nothing in it can become markup.

// Create an element: h('button.small', {onclick, title}, 'text', child, ...). Unknown properties become attributes.
export function h(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split('.');
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(' ');
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === 'style') Object.assign(element.style, value);
    else if (key === 'test') element.dataset.test = value;
    else if (key in element && !key.startsWith('aria-')) element[key] = value;
    else element.setAttribute(key, value === true ? '' : value);
  }
  element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
  return element;
}

// Announce a text to screen readers.
export const announce = text => { document.getElementById('live').textContent = text; };
const floating = h('div.tip', {hidden: true, role: 'tooltip'});

// Show a tooltip at a point of the window. lines: its texts, or null to hide it.
export function tip(lines, x, y) {
  if (!floating.isConnected) document.body.append(floating);
  floating.hidden = !lines;
  if (!lines) return;
  floating.replaceChildren(...lines.map(line => h('div', {}, line)));
  const {width, height} = floating.getBoundingClientRect();
  floating.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
  floating.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 10) : y + 18}px`;
}
