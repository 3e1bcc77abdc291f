// Who sees whom: the rule of Span.visible in attention.py, for pictures of masks.

/** Whether the query at t sees the key at s: all before it and itself; in a window of W tokens these, and the first `globals`. */
export const sees = ({window, globals}, t, s) => s <= t && (window === null || t - s < window || s < globals);

/** Whether any query from t to tEnd (not included) sees any key from s to sEnd. */
export const seesAny = ({window, globals}, t, tEnd, s, sEnd) =>
  s < tEnd && (window === null || t - (sEnd - 1) < window || s < globals);
