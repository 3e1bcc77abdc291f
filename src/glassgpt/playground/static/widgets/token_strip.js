// Tokens as a row of buttons that the arrow keys walk through.
import {exportableElement, h, inkOn, onTheme, shade} from '../core/index.js';
import {roving} from './figure.js';

const MAX_BITS = 12;  // of surprisal, at which a color is strongest

// share(i): 0 to 1 for the color of token i, or null for none. hint(i): its tooltip. onSelect(i): it was selected;
// selected: its index. selectOnMove: whether the arrow keys select, or only move the focus. The element's `select(i)`
// shows a selection, `press(isPressed)` any number of them, and `tint(share)` other colors.
export function tokenStrip({pieces, partial = [], share = () => null, hint = () => '', onSelect, selected = null,
  label = 'Tokens', scale = 'magnitude', selectOnMove = true, test, signal}) {
  const buttons = pieces.map((piece, i) => h(partial[i] ? 'button.token.partial' : 'button.token', {
    type: 'button', 'data-i': i, 'aria-pressed': String(i === selected), onclick: () => choose(i)}, piece));
  const strip = h('div.tokens.tall', {role: 'group', 'aria-label': label, test},
    buttons.flatMap((button, i) => (pieces[i].includes('⏎') ? [button, h('br')] : [button])));
  const reachable = roving(strip, () => buttons, {onMove: i => selectOnMove && choose(i)});
  const press = isPressed => buttons.forEach((button, i) => button.setAttribute('aria-pressed', String(isPressed(i))));
  function choose(i) {
    if (selectOnMove) strip.select(i);
    onSelect?.(i);
  }
  function tint(now = share) {
    share = now;
    buttons.forEach((button, i) => {
      const value = share(i), isTinted = value !== null;
      Object.assign(button.style, {background: isTinted ? shade(scale, value) : '', color: isTinted
        ? inkOn(scale, value) : ''});
      button.title = hint(i);
    });
  }
  reachable(selected ?? 0);
  onTheme(() => tint(), signal);
  tint();
  return Object.assign(strip, {press, tint, figure: exportableElement(strip), select(i) {
    press(j => j === i);
    reachable(i ?? 0);
  }});
}

// A strip colored by surprisal. tokens: {pieces, ids, surprisal, partial}; further settings are those of `tokenStrip`.
export const surprisalStrip = ({pieces, ids, surprisal, partial}, settings) => tokenStrip({
  pieces, partial, share: i => (i ? surprisal[i] / MAX_BITS : null),
  hint: i => `${pieces[i]} · id ${ids[i]}${i ? ` · ${surprisal[i].toFixed(2)} bits` : ''}`, ...settings});

// The ends of its scale, for `ramp`.
export const SURPRISAL_ENDS = ['0 bits', `${MAX_BITS} bits or more`];
