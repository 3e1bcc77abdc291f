// The page's entry point. It exchanges the token for a cookie that scripts cannot read, then starts the page.
//
// The token comes in the address (#token=..., which browsers send to no server) or from the form. A cookie of an earlier visit
// is enough. Without either, the form is shown; after a restart of the server the old cookie is refused, and api.js reloads.

const login = token => fetch('/api/login', {
  method: 'POST', headers: {'content-type': 'application/json'}, body: JSON.stringify({token}),
});

const parameters = new URLSearchParams(location.hash.slice(1));
const token = parameters.get('token');
if (token !== null) {
  parameters.delete('token');  // not to stay in the address bar or the history
  history.replaceState(null, '', parameters.size ? `#${parameters}` : location.pathname);
}
const session = token === null ? await fetch('/api/login') : await login(token);
if (session.ok) {
  await import('./main.js');
} else {
  const form = document.getElementById('login');
  form.hidden = false;
  form.elements.token.focus();
  form.addEventListener('submit', async event => {
    event.preventDefault();
    const response = await login(form.elements.token.value);
    if (response.ok) location.reload();
    else document.getElementById('login-error').textContent = 'This is not the token of this server.';
  });
}
