// Tokens as a row of buttons that the arrow keys walk through.

import {exportableElement, h, inkOn, onTheme, shade} from '../core/index.js';

/**
 * share(i): 0 to 1 for the color of token i, or null for none. hint(i): its tooltip. onSelect(i): it was selected;
 * selected: its index. selectOnMove: whether the arrow keys select, or only move the focus. The element's `select(i)`
 * shows a selection, `press(isPressed)` any number of them, and `tint(share)` other colors.
 */
export function tokenStrip({pieces, partial = [], share = () => null, hint = () => '', onSelect, selected = null,
  label = 'Tokens', scale = 'magnitude', selectOnMove = true, test, signal}) {
  const buttons = pieces.map((piece, i) => h(partial[i] ? 'button.token.partial' : 'button.token', {
    type: 'button', tabIndex: i === (selected ?? 0) ? 0 : -1, 'data-i': i, 'aria-pressed': String(i === selected),
    onclick: () => choose(i),
  }, piece));
  const withBreaks = buttons.flatMap((button, i) => (pieces[i].includes('⏎') ? [button, h('br')] : [button]));
  const strip = h('div.tokens.tall', {role: 'group', 'aria-label': label, test, onkeydown(event) {
    const at = buttons.indexOf(document.activeElement);
    const to = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: buttons.length - 1}[event.key];
    if (at < 0 || to === undefined || !buttons[to]) return;
    event.preventDefault();
    if (selectOnMove) choose(to);
    else focusable(to);
    buttons[to].focus();
  }}, withBreaks);
  const focusable = i => buttons.forEach((button, j) => { button.tabIndex = j === i ? 0 : -1; });
  const press = isPressed => buttons.forEach((button, i) => button.setAttribute('aria-pressed', String(isPressed(i))));

  function choose(i) {
    if (selectOnMove) strip.select(i);
    onSelect?.(i);
  }

  function tint(now = share) {
    share = now;
    buttons.forEach((button, i) => {
      const value = share(i);
      button.style.background = value === null ? '' : shade(scale, value);
      button.style.color = value === null ? '' : inkOn(scale, value);
      button.title = hint(i);
    });
  }

  onTheme(() => tint(), signal);
  tint();
  return Object.assign(strip, {press, tint, figure: exportableElement(strip), select(i) {
    press(j => j === i);
    focusable(i ?? 0);
  }});
}
